"""The picture tokenizer of Janus (arXiv 2410.13848), of LlamaGen's architecture (arXiv 2406.06525)."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from tokenizer.adapters.base.adapter import ADAPTERS
from tokenizer.adapters.base.pictures import PictureAdapter


@ADAPTERS.register("janus")
class Janus(PictureAdapter):
    classes = ("JanusVQVAEConfig", "JanusVQVAE")
    model_types = ("janus", "janus_vqgan")

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer(z.T[None, :, :, None])[2].reshape(-1, 1)

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        """The decoder sees the codes on the unit sphere."""
        return functional.normalize(quantizer.embedding.weight, dim=-1)
