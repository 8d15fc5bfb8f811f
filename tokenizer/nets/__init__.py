"""One file per encoder and decoder. A file here registers itself by being here."""
