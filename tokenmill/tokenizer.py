"""`tokenmill.Tokenizer`: the frozen tokenizer, which also reads URLs."""

from pathlib import Path

import torch

import tokenizer.tokenizer
from pipeline import storage


class Tokenizer(tokenizer.tokenizer.Tokenizer):
    __doc__ = tokenizer.tokenizer.Tokenizer.__doc__

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Tokenizer":
        """folder: a local folder, or a URL such as s3://bucket/run/tokenizers/fsp-K1024.

        Raises FileNotFoundError if a file is missing, and TokenizerMismatch if one is damaged, written by a newer
        version, or does not have the ids in tokenizer.json.
        """
        with storage.downloaded(str(folder)) as local:
            loaded = super().from_pretrained(local, device)
        assert isinstance(loaded, cls)
        return loaded

    @staticmethod
    def read_file(place: str) -> bytes:
        """The content of a file or URL."""
        return storage.read(place)
