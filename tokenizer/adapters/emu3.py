"""The picture tokenizer of Emu3 (arXiv 2409.18869). It is one of videos: a picture is a video that stands still."""

from typing import Any

from torch import Tensor

from tokenizer.adapters.base.adapter import ADAPTERS, Facts
from tokenizer.adapters.base.pictures import PictureAdapter


@ADAPTERS.register("emu3")
class Emu3(PictureAdapter):
    classes = ("Emu3VQVAEConfig", "Emu3VQVAE")
    model_types = ("emu3", "emu3_vqgan")

    def read_facts(self, config: Any) -> Facts:
        factor = 2 ** (len(config.channel_multiplier) - 1)
        return Facts(factor=factor, dim=config.embed_dim, codebook_size=config.codebook_size)

    def encode(self, model: Any, x: Tensor) -> Tensor:
        frames = self.normalised(x)[:, None].repeat(1, model.config.temporal_downsample_factor, 1, 1, 1)
        return model.quant_conv(model.encoder(frames).transpose(1, 2))[:, :, 0]

    def decode(self, model: Any, h: Tensor) -> Tensor:
        codes = h[:, :, None].contiguous()
        frames = model.decoder(model.post_quant_conv(codes).transpose(1, 2), codes.transpose(1, 2))
        height, width = (side * self.facts.factor for side in h.shape[2:])
        return self.pixels(frames.reshape(len(h), -1, model.config.out_channels, height, width)[:, 0])

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        return quantizer(z.T[None, None, :, :, None]).reshape(-1, 1)
