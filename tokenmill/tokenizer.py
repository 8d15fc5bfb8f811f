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
        try:
            with storage.downloaded(str(folder)) as local:
                loaded = super().from_pretrained(local, device)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{_did_you_mean(str(folder))}") from error
        assert isinstance(loaded, cls)
        return loaded

    @staticmethod
    def read_file(place: str) -> bytes:
        """The content of a file or URL."""
        return storage.read(place)


def _did_you_mean(folder: str) -> str:
    """The tokenizers of a run, if the folder is one; else nothing."""
    url = storage.normalise(folder)
    places = [*storage.list_folders(url), *storage.list_folders(storage.join(url, "tokenizers"))]
    found = [place for place in places if storage.exists(storage.join(place, "tokenizer.json"))]
    return f"; did you mean {' or '.join(found)}?" if found else ""
