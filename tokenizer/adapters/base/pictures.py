"""What the families of picture tokenizers share: encoder, 1x1 convolution, codes, 1x1 convolution, decoder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tokenizer.adapters.base.adapter import Adapter, Facts
from tokenizer.errors import UnsupportedModel

PREFIXES = ("", "vqmodel.", "model.vqmodel.")  # a model of text and pictures holds its tokenizer under one of these


class PictureAdapter(Adapter):
    """The tokenizer of a model of text and pictures has its config in "vq_config" of the model's config.json."""

    modality = "image"
    quantizer_name = "quantize"
    processor_keys = ("image_mean", "image_std")

    def read_facts(self, config: Any) -> Facts:
        if config.in_channels != 3:
            raise UnsupportedModel(f"this model has {config.in_channels} channels; Tokenmill's pictures are RGB")
        factor = 2 ** (len(config.channel_multiplier) - 1)
        return Facts(factor=factor, dim=config.embed_dim, codebook_size=config.num_embeddings)

    def read(self, folder: Path) -> nn.Module:
        """Reads only the tensors of the tokenizer, which a large model has among many others."""
        model = self.build()
        found = _tensors(folder, set(model.state_dict()))
        missing, _ = model.load_state_dict(found, strict=False)
        if missing:
            raise UnsupportedModel(f"{folder} lacks {len(missing)} tensors of the tokenizer, such as {missing[0]}")
        return model

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.quant_conv(model.encoder(self.normalised(x)))

    def decode(self, model: Any, h: Tensor) -> Tensor:
        return self.pixels(model.decoder(model.post_quant_conv(h)))

    def normalised(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return (x - mean) / std

    def pixels(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return x * std + mean

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [self.processor.get(name, [0.5, 0.5, 0.5]) for name in self.processor_keys]
        mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in values)
        return mean, std

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        return self.codebook(quantizer, 0)[indices[:, 0]]

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        return quantizer.embedding.weight


def _tensors(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of these names, with any of the prefixes, from all safetensors files of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # not a dict
                for prefix in PREFIXES:
                    if key.startswith(prefix) and key.removeprefix(prefix) in names:
                        found[key.removeprefix(prefix)] = tensors.get_tensor(key).float()
    return found
