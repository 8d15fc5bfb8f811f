"""The interface of all adapters, and what families share."""
