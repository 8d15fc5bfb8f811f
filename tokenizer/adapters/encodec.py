"""EnCodec (arXiv 2210.13438): a causal codec with an LSTM, so a clip is encoded whole."""

from typing import Any

import torch
from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS, Adapter, Facts
from tokenizer.errors import UnsupportedModel


@ADAPTERS.register("encodec")
class Encodec(Adapter):
    modality = "audio"
    classes = ("EncodecConfig", "EncodecModel")
    model_types = ("encodec",)
    one_by_one = True
    pads = True

    def read_facts(self, config: Any) -> Facts:
        if config.audio_channels != 1:
            raise UnsupportedModel(
                f"this EnCodec model has {config.audio_channels} channels; Tokenmill's audio is mono"
            )
        if config.normalize or config.chunk_length_s:
            raise UnsupportedModel(
                "this EnCodec model divides each chunk by its loudness, which its tokens do not hold; choose a model "
                "with normalize=false and no chunk_length_s, such as encodec_24khz"
            )
        return Facts(
            factor=config.hop_length,
            dim=config.hidden_size,
            codebook_size=config.codebook_size,
            num_quantizers=config.num_quantizers,
            sample_rate=config.sampling_rate,
        )

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, h: Tensor) -> Tensor:
        return model.decoder(h)

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        residual, indices = z.T[None], []  # the library's own loop takes a bandwidth, not a number of codebooks
        for layer in quantizer.layers[:num_quantizers]:
            indices.append(layer.encode(residual))
            residual = residual - layer.decode(indices[-1])
        return torch.cat(indices).T

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        return quantizer.decode(indices.T[:, None])[0].T

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        return quantizer.layers[number].codebook.embed
