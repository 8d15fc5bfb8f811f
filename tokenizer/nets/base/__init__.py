"""The interface of all nets, and windows for long sequences."""
