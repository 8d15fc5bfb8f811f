"""The interface of all quantizers, and code that several of them share."""
