"""The contract of all nets, and long sequences in windows."""
