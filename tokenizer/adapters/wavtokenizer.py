"""WavTokenizer (arXiv 2408.16532): one codebook; an LSTM and attention, so a clip is encoded whole."""

from typing import Any

import torch
from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS, Adapter, Facts


@ADAPTERS.register("wavtokenizer")
class WavTokenizer(Adapter):
    modality = "audio"
    classes = ("WavTokenizerConfig", "WavTokenizerModel")
    model_types = ("wavtokenizer",)
    quantizer_name = "encoder_model.quantizer"
    one_by_one = True
    pads = True

    def read_facts(self, config: Any) -> Facts:
        return Facts(
            factor=config.hop_length,
            dim=config.hidden_size,
            codebook_size=config.codebook_size,
            sample_rate=config.sampling_rate,
        )

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder_model.encoder(x)

    def decode(self, model: Any, h: Tensor) -> Tensor:
        return model.head(model.backbone(h, torch.zeros(1, dtype=torch.int64, device=h.device)))

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer.encode(z.T[None]).reshape(-1, 1)

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        return quantizer.decode(indices.T)[0].T

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        return quantizer.codebook.embed
