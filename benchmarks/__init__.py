"""Measurements of Tokenmill and other libraries side by side: `python -m benchmarks [name...]`."""
