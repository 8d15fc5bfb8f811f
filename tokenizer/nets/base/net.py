"""The registry of encoder and decoder pairs, and their interface."""

from typing import Any, ClassVar

from torch import Tensor, nn

from tokenizer.registry import Registry

NETS: Registry["Net"] = Registry("net", "tokenizer.nets")


class Net(nn.Module):
    """An encoder and a decoder, without the quantizer between them.

    factor: input units (pixels, audio samples) per token in each dimension. channels: of the encoder's output.
    in_channels and spatial_dims: of the input; 3 and 2 for RGB pictures. one_by_one, pads and
    decodes: see Adapter.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    factor: int
    channels: int
    in_channels: int = 3
    spatial_dims: int = 2
    one_by_one: bool = False
    pads: bool = False
    decodes: bool = True

    @property
    def values_per_token(self) -> int:
        """D_x / T: input values per token; 48 for RGB pictures at factor 4."""
        return self.in_channels * self.factor**self.spatial_dims

    def encode(self, x: Tensor) -> Tensor:
        """[B, input channels, H, W], sides multiples of factor -> [B, channels, H/factor, W/factor]."""
        raise AssertionError(f"{type(self).__name__} lacks encode")

    def decode(self, h: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, input channels, h * factor, w * factor]."""
        raise AssertionError(f"{type(self).__name__} lacks decode")

    def encode_frozen(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`encode` for a frozen tokenizer. A sample's result must not depend on the others in its batch."""
        return self.encode(x)

    def decode_frozen(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.decode(h)


def build_net(settings: dict[str, Any]) -> Net:
    """A net from {"name": ..., and fields of its Config}. Raises ValueError for an unknown name."""
    settings = dict(settings)
    cls = NETS.get(settings.pop("name"))
    return cls(cls.Config(**settings))
