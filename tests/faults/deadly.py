"""A modality whose decoder crashes on a marked image, as C libraries may. It goes into a copy of the program."""

import signal

from tokenizer.modalities.base import MODALITIES, Decoded
from tokenizer.modalities.image.modality import Image

MARK = b"decoding this image kills the process"


@MODALITIES.register("deadly")
class Deadly(Image):
    def from_bytes(self, data: bytes, extension: str = "") -> Decoded:
        if data == MARK:
            signal.raise_signal(signal.SIGSEGV)  # in this thread: os.kill may end the process only after the commit
        return super().from_bytes(data, extension)
