"""VQModel of diffusers: the VQGANs of latent diffusion (arXiv 2112.10752), Kandinsky, aMUSEd and others."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.adapters.base.adapter import ADAPTERS, READING, Facts, library
from tokenizer.adapters.base.pictures import PictureAdapter
from tokenizer.errors import UnsupportedModel


@ADAPTERS.register("vq_model")
class VQModel(PictureAdapter):
    package = "diffusers"
    classes = ("VQModel", "VQModel")
    model_types = ("VQModel",)

    def model_config(self) -> Any:
        cls = getattr(library(self.package), self.classes[1])
        return cls.extract_init_dict(dict(self.config))[0]

    def build(self) -> nn.Module:
        return getattr(library(self.package), self.classes[1]).from_config(self.config)

    def read(self, folder: Path) -> nn.Module:
        cls = getattr(library(self.package), self.classes[1])
        return cls.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, **READING)

    def read_facts(self, config: Any) -> Facts:
        channels = config.get("in_channels", 3)
        if channels != 3:
            raise UnsupportedModel(f"this VQModel has {channels} channels; Tokenmill's pictures are RGB")
        return Facts(
            factor=2 ** (len(config.get("block_out_channels", (64,))) - 1),
            dim=config.get("vq_embed_dim") or config.get("latent_channels", 3),
            codebook_size=config.get("num_vq_embeddings", 256),
        )

    def decode(self, model: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        spatial = h if model.config.norm_type == "spatial" else None
        return self.pixels(model.decoder(model.post_quant_conv(h), spatial))

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer(z.T[None, :, :, None])[2][2].reshape(-1, 1)
