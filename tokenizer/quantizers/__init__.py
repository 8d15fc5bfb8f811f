"""One file per method. A file here registers itself by being here."""
