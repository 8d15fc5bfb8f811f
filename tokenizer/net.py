"""The registry of encoder and decoder pairs, and what each must offer."""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tokenizer.registry import Registry

NETS: Registry["Net"] = Registry("net", "tokenizer.nets")


class Net(nn.Module):
    """An encoder and a decoder without the quantizer between them.

    factor: input units per token and spatial dimension. channels: of the features between encoder and projection.
    in_channels and spatial_dims: of the input, 3 and 2 for RGB pictures.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    factor: int
    channels: int
    in_channels: int = 3
    spatial_dims: int = 2

    @property
    def values_per_token(self) -> int:
        """D_x / T: how many values of the input one token stands for, 48 for RGB at factor 4."""
        return self.in_channels * self.factor**self.spatial_dims

    def encode(self, x: Tensor) -> Tensor:
        """[B, input channels, H, W] with sides that are multiples of factor -> [B, channels, H/factor, W/factor]."""
        raise AssertionError(f"{type(self).__name__} lacks encode")

    def decode(self, h: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, input channels, h * factor, w * factor]."""
        raise AssertionError(f"{type(self).__name__} lacks decode")

    def encode_frozen(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`encode` for a frozen tokenizer: what a sample gives must not depend on what lies beside it."""
        return self.encode(x)

    def decode_frozen(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.decode(h)


class Context(NamedTuple):
    """Frames before and after a frame that its result depends on."""

    before: int
    after: int


class SequenceNet(Net):
    """A net over time, [B, input channels, T], that takes a mask and says how far it sees.

    mask [B, 1, F] (bool, or 0 and 1) tells which of the F = T / factor frames are real; None: all. What stands in the
    others has no effect, and a clip's result is what it would be alone, but for rounding, which may change with the
    shape that a library of convolutions is given: tokenizer/windows.py keeps that the same. Results are 0 where the
    mask is. encode and decode raise ValueError for a mask of another shape, encode for a T that is no multiple.
    """

    in_channels = 1
    spatial_dims = 1
    window_frames: int  # of the windows that a frozen tokenizer computes in

    def encode_frozen(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        from tokenizer.windows import encode_in_windows  # which needs this module

        return encode_in_windows(self, x, mask, self.window_frames)

    def decode_frozen(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        from tokenizer.windows import decode_in_windows

        return decode_in_windows(self, h, mask, self.window_frames)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, input channels, T] with T a multiple of factor -> [B, channels, F]."""
        raise AssertionError(f"{type(self).__name__} lacks encode")

    def decode(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, channels, F] -> [B, input channels, F * factor]."""
        raise AssertionError(f"{type(self).__name__} lacks decode")

    @property
    def encode_context(self) -> Context:
        """Frames around a frame whose samples its features depend on."""
        raise AssertionError(f"{type(self).__name__} lacks encode_context")

    @property
    def decode_context(self) -> Context:
        """Frames around a frame whose features its samples depend on."""
        raise AssertionError(f"{type(self).__name__} lacks decode_context")


def build_net(settings: dict[str, Any]) -> Net:
    """A net from {"name": ..., and the fields of its Config}."""
    settings = dict(settings)
    cls = NETS.get(settings.pop("name"))
    return cls(cls.Config(**settings))  # type: ignore[call-arg]
