"""The registry of encoder and decoder pairs, and what each must offer."""

from typing import Any, ClassVar

from torch import Tensor, nn

from tokenizer.registry import Registry

NETS: Registry["Net"] = Registry("net", "tokenizer.nets")


class Net(nn.Module):
    """An encoder and a decoder without the quantizer between them.

    factor: input units per token and spatial dimension. channels: of the features between encoder and projection.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    factor: int
    channels: int

    def encode(self, x: Tensor) -> Tensor:
        """[B, input channels, H, W] with sides that are multiples of factor -> [B, channels, H/factor, W/factor]."""
        raise AssertionError(f"{type(self).__name__} lacks encode")

    def decode(self, h: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, input channels, h * factor, w * factor]."""
        raise AssertionError(f"{type(self).__name__} lacks decode")


def build_net(settings: dict[str, Any]) -> Net:
    """A net from {"name": ..., and the fields of its Config}."""
    settings = dict(settings)
    cls = NETS.get(settings.pop("name"))
    return cls(cls.Config(**settings))  # type: ignore[call-arg]
