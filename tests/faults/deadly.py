"""A modality whose decoder crashes on a marked picture, as C libraries do: put into tokenizer/modalities of a copy."""

import os
import signal

from tokenizer.modalities.base import MODALITIES, Decoded
from tokenizer.modalities.image.modality import Image

MARK = b"this picture kills who decodes it"


@MODALITIES.register("deadly")
class Deadly(Image):
    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        if data == MARK:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().from_bytes(data, extension)
