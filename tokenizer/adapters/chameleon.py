"""The picture tokenizer of Chameleon (arXiv 2405.09818). The library has no decoder of it, so it only encodes."""

from typing import Any

from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS
from tokenizer.adapters.base.pictures import PictureAdapter


@ADAPTERS.register("chameleon")
class Chameleon(PictureAdapter):
    classes = ("ChameleonVQVAEConfig", "ChameleonVQVAE")
    model_types = ("chameleon", "chameleon_vqgan")
    decodes = False

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer(z.T[None, :, :, None])[2].reshape(-1, 1)
