"""The contract of all quantizers, and what several of them share."""
