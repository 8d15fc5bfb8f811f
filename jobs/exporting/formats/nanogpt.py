"""nanoGPT: train.bin, the tokens of all rows one after another, and meta.pkl with the size of the vocabulary."""

import pickle

from jobs.exporting.format import FORMATS, PARTS, Chunks, Format, Part, joined
from jobs.exporting.rows import Rows


@FORMATS.register("nanogpt")
class NanoGPT(Format):
    """uint16 as train.py of nanoGPT reads it, or uint32 for larger vocabularies."""

    dtypes = ("uint16", "uint32")

    def files(self, rows: Rows, number: int) -> dict[str, bytes]:
        return {f"{PARTS}/{number:06d}.bin": self.flatten(rows).tobytes()}

    def index(self, parts: list[Part], folder: str) -> dict[str, Chunks]:
        meta = pickle.dumps({"vocab_size": self.vocabulary_size}, protocol=4)
        return {
            "train.bin": joined(folder, [name for part in parts for name in part.files]),
            "meta.pkl": lambda: [meta],
        }
