"""The HTML pages of a run, one file each; templates/ holds their markup, style and script."""
