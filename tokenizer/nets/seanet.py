"""A convolutional waveform codec like SEANet (arXiv 2009.02095), EnCodec (2210.13438) and DAC (2306.06546).

Legend: x [B, 1, T] samples, h [B, channels, F] features with F = T / factor; a frame is factor samples, one token.

Padding never changes the features of a clip. Every convolution pads its input with zeros, keeps the exact length, and
clears its output where the mask marks padding; Snake and ELU map 0 to 0. So after the end of a clip each convolution
sees the same zeros as if the clip were alone in its batch. There is no norm over time.
Differs from DAC: Snake's scale is always positive; the output is linear instead of tanh (no saturation on loud clips;
writing the samples clips them); the widths of the decoder are independent of the encoder's.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenizer.nets.base.net import NETS
from tokenizer.nets.base.sequence import Context, SequenceNet

KERNEL = 7  # of the residual units and the first and last convolution, as in DAC


@dataclass
class SEANetConfig:
    """strides: one per stage; their product is the number of samples per frame, and each stage doubles the width.

    width, decoder_width: channels at the waveform's sample rate. causal: frame t depends only on samples up to the end
    of frame t, and sample n only on frames up to its own.
    """

    width: int = 24
    decoder_width: int = 64
    strides: list[int] = field(default_factory=lambda: [6, 4, 4])
    dilations: list[int] = field(default_factory=lambda: [1, 3, 9])  # one residual unit each, in every stage
    channels: int = 128  # of the encoder's output
    activation: str = "snake"
    causal: bool = False
    window_frames: int = 166  # frames per window in a frozen tokenizer, without the context

    def __post_init__(self) -> None:
        if min(self.width, self.decoder_width, self.channels) < 1:
            raise ValueError(
                f"model.net.width={self.width}, decoder_width={self.decoder_width} and channels={self.channels} "
                "must be 1 or more"
            )
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"model.net.strides={self.strides} must be a list of one or more numbers, each 2 or more")
        if self.dilations and min(self.dilations) < 1:
            raise ValueError(f"model.net.dilations={self.dilations} must be numbers that are 1 or more")
        if self.window_frames < 1:
            raise ValueError(f"model.net.window_frames={self.window_frames} must be 1 or more")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model.net.activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")


@NETS.register("seanet")
class SEANet(SequenceNet):
    Config = SEANetConfig

    def __init__(self, config: SEANetConfig):
        super().__init__()
        self.factor = math.prod(config.strides)
        self.channels, self.window_frames = config.channels, config.window_frames
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    @property
    def encode_context(self) -> Context:
        first, last = self.encoder.reach(0, 0)  # samples that frame 0 depends on
        return Context(-(first // self.factor), last // self.factor)

    @property
    def decode_context(self) -> Context:
        first, last = self.decoder.reach(0, self.factor - 1)  # frames that the samples of frame 0 depend on
        return Context(-first, last)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] == 0 or x.shape[-1] % self.factor:
            raise ValueError(f"x has {x.shape[-1]} samples; pad it to a multiple of {self.factor} above 0")
        padding = _padding(mask, len(x), x.shape[-1] // self.factor)
        return self.encoder(_clear(x, padding), padding)

    def decode(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = _padding(mask, len(h), h.shape[-1])
        return self.decoder(_clear(h, padding), padding)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with one a > 0 per channel: [B, width, T], any dtype. Source: arXiv 2006.08195, eq. 3.

    Differs: log a is learned (arXiv 2206.04658), so that a never crosses 0 and weight decay pulls it to 1.
    """

    def __init__(self, width: int):
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.log_a.exp()
        return x + (a * x).sin().square() / a


def _elu(width: int) -> nn.Module:
    return nn.ELU()


ACTIVATIONS = {"snake": Snake, "elu": _elu}  # width -> a function of each value that keeps 0 at 0


class Convolution(nn.Module):
    """Weight-normalised convolution: [B, width_in, T] -> [B, width_out, T / stride], 0 in frames that are padding.

    weight = scale * direction / |direction|, the norm over all but the first axis (arXiv 1602.07868, eq. 2). Not
    torch's weight_norm, because modules with parametrizations cannot be pickled, which Ray does.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, *, causal: bool, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.stride, self.dilation, self.span = stride, dilation, (kernel - 1) * dilation
        extra = self.span + 1 - stride  # zeros that keep the length at T / stride
        self.before = extra if causal else extra // 2
        self.after = extra - self.before
        like = nn.Conv1d(width_in, width_out, kernel)
        self.direction, self.scale, self.bias = _weight_norm_of(like)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        x = functional.pad(x, (self.before, self.after))
        weight = _weight(self.direction, self.scale)
        return _clear(functional.conv1d(x, weight, self.bias, self.stride, dilation=self.dilation), padding)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """The first and last input that outputs first..last depend on."""
        return first * self.stride - self.before, last * self.stride - self.before + self.span


class TransposedConvolution(nn.Module):
    """Weight-normalised, kernel size 2 * stride: [B, width_in, T] -> [B, width_out, T * stride], 0 in padding."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, causal: bool):
        super().__init__()
        self.stride = stride
        self.cut = 0 if causal else stride // 2  # removed from the start of the T * stride + stride outputs
        like = nn.ConvTranspose1d(width_in, width_out, 2 * stride, stride)
        self.direction, self.scale, self.bias = _weight_norm_of(like)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        weight = _weight(self.direction, self.scale)
        full = functional.conv_transpose1d(x, weight, self.bias, self.stride)
        return _clear(full[..., self.cut : self.cut + x.shape[-1] * self.stride], padding)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """As Convolution.reach. Output n before the cut depends on inputs n // stride - 1 and n // stride."""
        return (first + self.cut) // self.stride - 1, (last + self.cut) // self.stride


class Activated(nn.Module):
    """An activation followed by a convolution."""

    def __init__(self, activation: nn.Module, convolution: Convolution | TransposedConvolution):
        super().__init__()
        self.activation, self.convolution = activation, convolution

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return self.convolution(self.activation(x), padding)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return self.convolution.reach(first, last)


class Layers(nn.ModuleList):
    """Layers in sequence."""

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, padding)
        return x

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """The first and last input that outputs first..last depend on; negative before the start of the input."""
        for layer in reversed(self):
            first, last = layer.reach(first, last)  # type: ignore[operator]
        return first, last


class ResidualUnit(Layers):
    """Two activated convolutions, the first dilated, the second of size 1, with a skip connection."""

    def __init__(self, width: int, dilation: int, config: SEANetConfig):
        activation, causal = ACTIVATIONS[config.activation], config.causal
        super().__init__(
            [
                Activated(activation(width), Convolution(width, width, KERNEL, dilation=dilation, causal=causal)),
                Activated(activation(width), Convolution(width, width, 1, causal=causal)),
            ]
        )

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return x + super().forward(x, padding)


def _encoder(config: SEANetConfig) -> Layers:
    activation, causal, width = ACTIVATIONS[config.activation], config.causal, config.width
    layers: list[nn.Module] = [Convolution(1, width, KERNEL, causal=causal)]
    for stride in config.strides:
        layers += [ResidualUnit(width, dilation, config) for dilation in config.dilations]
        down = Convolution(width, 2 * width, 2 * stride, stride=stride, causal=causal)
        layers.append(Activated(activation(width), down))
        width *= 2
    layers.append(Activated(activation(width), Convolution(width, config.channels, 3, causal=causal)))
    return Layers(layers)


def _decoder(config: SEANetConfig) -> Layers:
    activation, causal = ACTIVATIONS[config.activation], config.causal
    width = config.decoder_width * 2 ** len(config.strides)
    layers: list[nn.Module] = [Convolution(config.channels, width, KERNEL, causal=causal)]
    for stride in reversed(config.strides):
        up = TransposedConvolution(width, width // 2, stride, causal=causal)
        layers.append(Activated(activation(width), up))
        width //= 2
        layers += [ResidualUnit(width, dilation, config) for dilation in config.dilations]
    layers.append(Activated(activation(width), Convolution(width, 1, KERNEL, causal=causal)))
    return Layers(layers)


def _weight_norm_of(like: nn.Conv1d | nn.ConvTranspose1d) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """direction and scale from torch's initialisation of the layer, and a bias of 0, as in DAC.

    With torch's initial biases the output of an untrained decoder was DC of 0.3 with a signal a thousand times smaller.
    """
    weight = like.weight.detach()
    return nn.Parameter(weight), nn.Parameter(_norm(weight)), nn.Parameter(torch.zeros(like.out_channels))


def _norm(direction: Tensor) -> Tensor:
    return direction.norm(dim=(1, 2), keepdim=True)


def _weight(direction: Tensor, scale: Tensor) -> Tensor:
    return scale * direction / _norm(direction)


def _padding(mask: Tensor | None, batch: int, frames: int) -> Tensor | None:
    """bool [B, 1, F], True for frames that are padding; None if there are none."""
    if mask is None:
        return None
    if mask.shape != (batch, 1, frames):
        raise ValueError(f"the mask has shape {list(mask.shape)}, but these clips need {[batch, 1, frames]}")
    return mask == 0


def _clear(x: Tensor, padding: Tensor | None) -> Tensor:
    """x [B, width, F * any] with zeros in the frames that are padding, even if they were NaN."""
    if padding is None:
        return x
    by_frame = x.unflatten(-1, (padding.shape[-1], -1))
    return by_frame.masked_fill(padding[..., None], 0).flatten(-2)
