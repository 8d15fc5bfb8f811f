"""The waveform codec net. Padding, other clips in the batch and windows must not change a clip's result."""

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tokenizer.nets.base.net import build_net
from tokenizer.nets.base.sequence import Context, SequenceNet, decode_in_windows, encode_in_windows
from tokenizer.nets.seanet import Convolution, SEANetConfig, Snake, TransposedConvolution

SMALL: dict[str, Any] = {"width": 16, "decoder_width": 24, "channels": 64}  # of configs/speech.yaml
TINY: dict[str, Any] = {"width": 4, "decoder_width": 3, "channels": 5, "dilations": [1, 3]}
KINDS: list[dict[str, Any]] = [
    {"strides": [3, 2]},
    {"strides": [3, 2], "causal": True},
    {"strides": [2, 5], "activation": "elu"},
    {"strides": [4], "dilations": []},
]
# Rounding of convolutions with another input shape, relative to the largest value: about 40 layers with 6e-8 each in
# float32, in random directions. Measured on a CPU: up to 4e-7. A wrong zero at an edge changes values by over 1e-2.
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seanet(**settings: Any) -> SequenceNet:
    torch.manual_seed(0)
    net = build_net({"name": "seanet", **TINY, **settings}).eval()
    for parameter in net.parameters():  # Snake's scales and the biases differ, as after training
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert isinstance(net, SequenceNet)
    return net


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def clip(net: SequenceNet, frames: int, seed: int = 1) -> Tensor:
    return torch.randn(1, 1, frames * net.factor, generator=torch.Generator().manual_seed(seed))


def features(net: SequenceNet, frames: int, seed: int = 1) -> Tensor:
    return torch.randn(1, net.channels, frames, generator=torch.Generator().manual_seed(seed))


def real(frames: int, total: int) -> Tensor:
    return (torch.arange(total) < frames)[None, None]


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= ROUNDING * b.abs().max()


# -- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [[6, 4, 4], [8, 5, 4, 2], [2], [3, 5], [7]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 17])
def test_a_frame_is_as_many_samples_as_the_product_of_strides(strides: list[int], causal: bool, frames: int):
    net = seanet(strides=strides, causal=causal)
    assert net.factor == math.prod(strides)
    h = net.encode(torch.randn(2, 1, frames * net.factor))
    assert h.shape == (2, net.channels, frames)
    assert net.decode(h).shape == (2, 1, frames * net.factor)


def test_the_papers_strides_give_166_67_tokens_a_second_at_16_khz():
    """Hop 96; with 10 bits per token, 1.67 kbit/s (docs/methods.md)."""
    rate = 16_000 / build_net({"name": "seanet", **SMALL}).factor
    assert (round(rate, 2), round(rate * 10 / 1000, 2)) == (166.67, 1.67)


@pytest.mark.parametrize("samples", [0, 5, 13])
def test_samples_that_fill_no_frame_are_refused(samples: int):
    net = seanet(strides=[3, 2])
    with pytest.raises(ValueError, match=f"x has {samples} samples.* multiple of 6"):
        net.encode(torch.zeros(1, 1, samples))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": []}, r"strides=\[\]"),
        ({"strides": [4, 1]}, r"strides=\[4, 1\]"),
        ({"dilations": [0]}, r"dilations=\[0\]"),
        ({"width": 0}, "width=0"),
        ({"activation": "relu"}, "activation='relu' must be one of snake, elu"),
    ],
)
def test_settings_that_make_no_net_are_reported_with_their_value(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SEANetConfig(**settings)


# -- layers -------------------------------------------------------------------------------------------------------


def test_snake_by_hand():
    """a = 2: 0 -> 0; pi / 4 -> pi / 4 + sin(pi / 2)^2 / 2; a = 1: -pi / 2 -> -pi / 2 + 1."""
    snake = Snake(2)
    snake.log_a.data = torch.tensor([[math.log(2)], [0.0]])
    x = torch.tensor([[[0, math.pi / 4], [0, -math.pi / 2]]])
    expected = torch.tensor([[[0, math.pi / 4 + 0.5], [0, -math.pi / 2 + 1]]])
    assert torch.allclose(snake(x), expected)
    assert (snake(x)[..., 0] == 0).all()  # exactly 0, otherwise padding would leak


@pytest.mark.parametrize(("stride", "dilation", "before"), [(1, 1, 3), (1, 3, 9), (2, 1, 2), (3, 1, 2)])
def test_convolution_is_torchs_with_weight_norm(stride: int, dilation: int, before: int):
    """Compared to torch.nn.utils.parametrizations.weight_norm, and to the plain layer with the same weight."""
    layer = Convolution(3, 4, 7, stride=stride, dilation=dilation, causal=False)
    layer.scale.data *= torch.rand_like(layer.scale) + 0.5
    plain = nn.Conv1d(3, 4, 7, stride, dilation=dilation)
    normed = parametrizations.weight_norm(copy.deepcopy(plain))
    normed.parametrizations.weight.original0.data = layer.scale.data  # type: ignore[union-attr, index]
    normed.parametrizations.weight.original1.data = layer.direction.data  # type: ignore[union-attr, index]
    normed.bias = plain.bias = layer.bias
    plain.weight.data = normed.weight.detach()
    x = torch.randn(2, 3, 12)
    padded = nn.functional.pad(x, (before, 6 * dilation + 1 - stride - before))
    assert torch.allclose(layer(x, None), normed(padded), atol=1e-6)
    assert torch.allclose(layer(x, None), plain(padded), atol=1e-6)


@pytest.mark.parametrize(("stride", "causal", "cut"), [(4, False, 2), (5, False, 2), (4, True, 0)])
def test_transposed_convolution_is_torchs_with_its_ends_cut(stride: int, causal: bool, cut: int):
    layer = TransposedConvolution(3, 4, stride, causal=causal)
    plain = nn.ConvTranspose1d(3, 4, 2 * stride, stride)
    plain.weight.data, plain.bias = layer.direction.data, layer.bias  # the scale starts as the norm of the direction
    x = torch.randn(2, 3, 6)
    assert torch.allclose(layer(x, None), plain(x)[..., cut : cut + 6 * stride], atol=1e-6)


# -- the net as a module ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_every_weight_takes_part(settings: dict[str, Any]):
    net = seanet(**settings)
    x = clip(net, 30)
    (net.decode(net.encode(x, real(25, 30))) - x).square().mean().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def by_pickle(net: SequenceNet) -> SequenceNet:
    return pickle.loads(pickle.dumps(net))


def by_state(net: SequenceNet) -> SequenceNet:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = seanet(strides=[3, 2])
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle, by_state])
def test_a_copy_gives_the_same_bits(make: Any):
    net = seanet(strides=[3, 2])
    x = clip(net, 9)
    other = make(net)
    assert torch.equal(other.encode(x), net.encode(x))
    assert torch.equal(other.decode(net.encode(x)), net.decode(net.encode(x)))


def test_bf16_autocast_trains():
    net = seanet(strides=[3, 2])
    x = clip(net, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = net.decode(net.encode(x, real(18, 20)), real(18, 20))
    assert torch.isfinite(x_hat).all()
    (x_hat.float() - x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert (x_hat.float() - net.decode(net.encode(x, real(18, 20)), real(18, 20))).abs().max() < 0.1


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("level", [0.0, 1.0, 100.0])
def test_silence_and_loud_dc_stay_finite_in_an_untrained_net(settings: dict[str, Any], level: float):
    net = build_net({"name": "seanet", **TINY, **settings})
    h = net.encode(torch.full((1, 1, 50 * net.factor), level))
    assert torch.isfinite(h).all()
    assert torch.isfinite(net.decode(h)).all()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_an_untrained_net_makes_silence_of_silence(settings: dict[str, Any]):
    net = build_net({"name": "seanet", **TINY, **settings})
    assert not net.decode(net.encode(torch.zeros(1, 1, 9 * net.factor))).any()


def test_weights_of_the_small_net_counted_by_hand():
    """Convolution: in * out * kernel + a scale per first axis + biases; Snake: one per channel."""

    def conv(width_in: int, width_out: int, kernel: int) -> int:
        return width_in * width_out * kernel + 2 * width_out

    def stage(width: int) -> int:
        return 3 * (width + conv(width, width, 7) + width + conv(width, width, 1))

    def up(width: int, stride: int) -> int:
        return width + width * width // 2 * 2 * stride + width + width // 2

    steps = [(16, 6), (32, 4), (64, 4)]
    encoder = conv(1, 16, 7) + sum(stage(w) + w + conv(w, 2 * w, 2 * s) for w, s in steps) + 128 + conv(128, 64, 3)
    steps = [(192, 4), (96, 4), (48, 6)]
    decoder = conv(64, 192, 7) + sum(up(w, s) + stage(w // 2) for w, s in steps) + 24 + conv(24, 1, 7)
    net = build_net({"name": "seanet", **SMALL})
    assert (count(net.encoder), count(net.decoder)) == (encoder, decoder) == (244_640, 578_906)


def test_the_papers_net_has_four_and_a_half_million_weights():
    net = build_net({"name": "seanet"})
    assert (net.factor, net.channels) == (96, 128)
    assert (count(net.encoder), count(net.decoder)) == (566_704, 3_944_002)


# -- context ------------------------------------------------------------------------------------------------------


def seen(run: Any, t: Tensor, first: int, last: int) -> tuple[int, int]:
    """The first and last input position that outputs first..last depend on, by gradient in float64."""
    t = t.double().requires_grad_()
    run(t)[..., first : last + 1].square().sum().backward()
    assert t.grad is not None
    where = t.grad.abs().sum(dim=1)[0].nonzero()
    return int(where.min()), int(where.max())


@pytest.mark.parametrize("settings", [*KINDS, {"strides": [6, 4, 4]}, {"strides": [7, 2], "causal": True}], ids=str)
def test_the_context_is_what_a_frame_depends_on_and_no_frame_more(settings: dict[str, Any]):
    net = seanet(**settings).double()
    f, middle, frames = net.factor, 40, 81
    first, last = seen(net.encode, clip(net, frames), middle, middle)
    assert (first, last) == tuple(middle * f + n for n in net.encoder.reach(0, 0))  # to the sample
    assert Context(middle - first // f, last // f - middle) == net.encode_context
    first, last = seen(net.decode, features(net, frames), middle * f, middle * f + f - 1)
    assert Context(middle - first, last - middle) == net.decode_context


def test_context_by_hand():
    """strides [2], dilations [1]: 3 + 3 samples, kernel 4 stride 2, kernel 3 of frames; decoder likewise.

    Encoder, frame 0: the last layer depends on frames -1..1, the strided one (kernel 4, one sample before) on samples
    -3..4. Adding +-3 twice gives -9..10, so 5 frames before and 5 after. Decoder, samples 0..1: adding +-3 twice gives
    -6..7. One output is cut, so these are full outputs -5..8, which depend on inputs -5 // 2 - 1 = -4 to 4. Adding +-3
    of the first layer gives -7..7.
    """
    net = seanet(strides=[2], dilations=[1])
    assert net.encode_context == Context(5, 5)
    assert net.decode_context == Context(7, 7)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_what_is_outside_of_the_context_changes_no_bit(settings: dict[str, Any]):
    net = seanet(**settings)
    frames, t = 80, 40
    for run, x, unit, unit_out, context in (
        (net.encode, clip(net, frames), net.factor, 1, net.encode_context),
        (net.decode, features(net, frames), 1, net.factor, net.decode_context),
    ):
        other = torch.randn_like(x)
        near = slice((t - context.before) * unit, (t + context.after + 1) * unit)
        other[..., near] = x[..., near]
        frame = slice(t * unit_out, (t + 1) * unit_out)
        assert torch.equal(run(other)[..., frame], run(x)[..., frame])
        assert not torch.equal(run(other)[..., frame.stop :], run(x)[..., frame.stop :])


@pytest.mark.parametrize("strides", [[6, 4, 4], [3, 2], [5, 7]], ids=str)
def test_a_causal_net_never_looks_ahead(strides: list[int]):
    net = seanet(strides=strides, causal=True)
    assert net.encode_context.after == net.decode_context.after == 0
    f, t = net.factor, 11
    x, h = clip(net, 20), features(net, 20)
    later_x, later_h = x.clone(), h.clone()
    later_x[..., (t + 1) * f :] += 1
    later_h[..., t + 1 :] += 1
    assert torch.equal(net.encode(later_x)[..., : t + 1], net.encode(x)[..., : t + 1])
    assert torch.equal(net.decode(later_h)[..., : (t + 1) * f], net.decode(h)[..., : (t + 1) * f])


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(("frames", "total"), [(1, 2), (7, 8), (7, 40), (30, 31), (30, 95)])
def test_padding_and_neighbours_change_nothing_but_rounding(settings: dict[str, Any], frames: int, total: int):
    net = seanet(**settings)
    f, mask = net.factor, torch.cat([real(total, total), real(frames, total), real(0, total)])
    x, h = clip(net, frames), features(net, frames)
    batch_x, batch_h = 9 * torch.randn(3, 1, total * f), 9 * torch.randn(3, net.channels, total)
    batch_x[1, :, : frames * f], batch_h[1, :, :frames] = x[0], h[0]
    assert_close(net.encode(batch_x, mask)[1:2, :, :frames], net.encode(x))
    assert_close(net.decode(batch_h, mask)[1:2, :, : frames * f], net.decode(h))


def test_without_the_mask_padding_would_change_the_end_of_a_clip():
    """Shows that the test above can fail."""
    net = seanet(strides=[3, 2])
    x = clip(net, 20)
    padded = nn.functional.pad(x, (0, 10 * net.factor))
    far = (net.encode(padded)[..., :20] - net.encode(x)).abs().amax(dim=(0, 1)) / net.encode(x).abs().max()
    assert far[-1] > 1e-2
    assert far[: 20 - net.encode_context.after].max() <= ROUNDING


def test_what_stands_in_the_padding_changes_no_bit_not_even_nan():
    net = seanet(strides=[3, 2])
    x, h, mask = clip(net, 20), features(net, 20), real(12, 20)
    other_x, other_h = x.clone(), h.clone()
    other_x[..., 12 * net.factor :], other_h[..., 12:] = math.nan, math.inf
    assert torch.equal(net.encode(other_x, mask), net.encode(x, mask))
    assert torch.equal(net.decode(other_h, mask), net.decode(h, mask))


def test_results_are_zero_in_the_padding_and_in_rows_of_padding():
    net = seanet(strides=[3, 2])
    mask = torch.cat([real(12, 20), real(0, 20)])
    h = net.encode(torch.randn(2, 1, 20 * net.factor), mask)
    x = net.decode(torch.randn(2, net.channels, 20), mask)
    assert h[0, :, :12].all()
    assert not h[0, :, 12:].any()
    assert not x[0, :, 12 * net.factor :].any()
    assert not h[1].any()
    assert not x[1].any()


def test_a_mask_may_be_zeros_and_ones():
    net = seanet(strides=[3, 2])
    x, mask = clip(net, 20), real(12, 20)
    assert torch.equal(net.encode(x, mask.float()), net.encode(x, mask))


def test_a_mask_of_another_shape_is_refused():
    net = seanet(strides=[3, 2])
    with pytest.raises(ValueError, match=r"the mask has shape \[1, 1, 7\], but these clips need \[1, 1, 8\]"):
        net.encode(clip(net, 8), real(7, 7))
    with pytest.raises(ValueError, match=r"the mask has shape \[1, 1, 7\], but these clips need \[1, 1, 8\]"):
        encode_in_windows(net, clip(net, 8), real(7, 7), 3)


# -- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("frames", [1, 10, 11, 57])
@pytest.mark.parametrize("window", [10, 1, 100])
def test_windows_give_what_the_whole_clip_gives(settings: dict[str, Any], frames: int, window: int):
    net = seanet(**settings)
    x, h = clip(net, frames), features(net, frames)
    assert_close(encode_in_windows(net, x, None, window), net.encode(x))
    assert_close(decode_in_windows(net, h, None, window), net.decode(h))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_windows_of_a_batch_with_holes_give_what_the_net_gives(settings: dict[str, Any]):
    net = seanet(**settings)
    mask = torch.cat([real(33, 33), real(0, 33), real(12, 33), ~real(15, 33)])
    x, h = torch.randn(4, 1, 33 * net.factor), torch.randn(4, net.channels, 33)
    assert_close(encode_in_windows(net, x, mask, 8), net.encode(x, mask))
    assert_close(decode_in_windows(net, h, mask, 8), net.decode(h, mask))


@pytest.mark.parametrize("settings", [*KINDS, {**SMALL, "dilations": [1, 3, 9]}], ids=str)
@pytest.mark.parametrize("total", [30, 31, 77])
def test_in_windows_a_clip_has_the_same_bits_alone_in_a_batch_and_padded(settings: dict[str, Any], total: int):
    net = seanet(**settings)
    frames, f = 30, net.factor
    x, h = clip(net, frames), features(net, frames)
    mask = torch.cat([real(total, total), real(frames, total), real(3, total)])
    batch_x, batch_h = torch.randn(3, 1, total * f), torch.randn(3, net.channels, total)
    batch_x[1, :, : frames * f], batch_h[1, :, :frames] = x[0], h[0]
    assert torch.equal(encode_in_windows(net, batch_x, mask, 16)[1:2, :, :frames], encode_in_windows(net, x, None, 16))
    both = decode_in_windows(net, batch_h, mask, 16), decode_in_windows(net, h, None, 16)
    assert torch.equal(both[0][1:2, :, : frames * f], both[1])


def test_windows_are_of_one_shape_so_memory_does_not_grow_with_the_clip():
    net = seanet(strides=[3, 2])
    shapes = []
    net.encoder.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    encode_in_windows(net, clip(net, 1000), None, 50)
    assert shapes == [(1, 1, (50 + sum(net.encode_context)) * net.factor)] * 20


def test_windows_without_a_real_frame_are_not_computed():
    net = seanet(strides=[3, 2])
    runs = []
    net.encoder.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    mask = torch.cat([real(100, 100), real(3, 100), real(0, 100)])
    h = encode_in_windows(net, torch.randn(3, 1, 600), mask, 10)
    assert len(runs) == 10 + 1
    assert not h[2].any()
    assert encode_in_windows(net, torch.randn(1, 1, 60), real(0, 10), 4).shape == (1, net.channels, 10)


def test_gradients_flow_through_windows_as_through_the_whole():
    net = seanet(strides=[3, 2]).double()
    x = clip(net, 25).double().requires_grad_()
    (whole,) = torch.autograd.grad(net.encode(x).square().sum(), x)
    (parts,) = torch.autograd.grad(encode_in_windows(net, x, None, 10).square().sum(), x)
    assert torch.allclose(whole, parts, rtol=1e-9, atol=1e-12)


def test_impossible_windows_are_refused():
    net = seanet(strides=[3, 2])
    with pytest.raises(ValueError, match="window_frames=0"):
        encode_in_windows(net, clip(net, 8), None, 0)
    with pytest.raises(ValueError, match="13 samples, 1 more than a multiple of 6"):
        encode_in_windows(net, torch.zeros(1, 1, 13), None, 4)
    with pytest.raises(ValueError, match="frames=0"):
        encode_in_windows(net, torch.zeros(1, 1, 0), None, 4)
