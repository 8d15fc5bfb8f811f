"""One module for each format; a new format is one new file here."""
