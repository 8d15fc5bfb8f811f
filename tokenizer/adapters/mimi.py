"""Mimi (arXiv 2410.00037): a codec with transformers in encoder and decoder, so a clip is encoded whole."""

from typing import Any

from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS, Adapter, Facts
from tokenizer.errors import UnsupportedModel


@ADAPTERS.register("mimi")
class Mimi(Adapter):
    """The first quantizer is semantic. The others are a residual quantizer of their own."""

    modality = "audio"
    classes = ("MimiConfig", "MimiModel")
    model_types = ("mimi",)
    one_by_one = True
    pads = True

    def read_facts(self, config: Any) -> Facts:
        if config.audio_channels != 1:
            raise UnsupportedModel(f"this Mimi model has {config.audio_channels} channels; Tokenmill's audio is mono")
        return Facts(
            factor=config.frame_size,
            dim=config.hidden_size,
            codebook_size=config.codebook_size,
            num_quantizers=config.num_quantizers,
            min_quantizers=config.num_semantic_quantizers,
            sample_rate=config.sampling_rate,
        )

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x).latents

    def decode(self, model: Any, h: Tensor) -> Tensor:
        return model.decoder(h).audio_values

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer.encode(z.T[None], num_quantizers)[:, 0].T

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        return quantizer.decode(indices.T[None])[0].T

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        part, layer = quantizer.semantic_residual_vector_quantizer, number
        if number >= quantizer.num_semantic_quantizers:
            part, layer = quantizer.acoustic_residual_vector_quantizer, number - quantizer.num_semantic_quantizers
        codes = part.layers[layer].codebook.embed
        return codes if part.output_proj is None else part.output_proj(codes.T[None])[0].T
