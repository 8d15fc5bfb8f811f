"""One file per method. Every file in this folder is registered automatically."""
