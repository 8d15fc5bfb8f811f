"""One file per encoder and decoder. Every file in this folder is registered automatically."""
