"""Descript Audio Codec (arXiv 2306.06546): convolutions only, so long clips run in windows."""

from typing import Any

from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS, Adapter, Facts
from tokenizer.adapters.base.windows import context_frames, in_windows


@ADAPTERS.register("dac")
class Dac(Adapter):
    """A clip is padded with zeros to whole tokens, as the family's feature extractor does."""

    modality = "audio"
    classes = ("DacConfig", "DacModel")
    model_types = ("dac",)
    one_by_one = True

    def read_facts(self, config: Any) -> Facts:
        return Facts(
            factor=config.hop_length,
            dim=config.hidden_size,
            codebook_size=config.codebook_size,
            num_quantizers=config.n_codebooks,
            sample_rate=config.sampling_rate,
        )

    def encode(self, model: Any, x: Tensor) -> Tensor:
        factor = self.facts.factor
        return in_windows(model.encoder, x, (factor, 1), context_frames(model.encoder, factor, decoder=False))

    def decode(self, model: Any, h: Tensor) -> Tensor:
        factor = self.facts.factor
        return in_windows(model.decoder, h, (1, factor), context_frames(model.decoder, factor, decoder=True))

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer(z.T[None], num_quantizers)[1][0].T

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        return quantizer.from_codes(indices.T[None])[0][0].T

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        layer = quantizer.quantizers[number]
        return layer.out_proj(layer.codebook.weight.T[None])[0].T
