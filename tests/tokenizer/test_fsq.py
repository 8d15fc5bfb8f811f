"""FSQ: tests F1 to F4, the formula of the paper's listing, and codebook usage with both kinds of edges."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.quantizers.fsq import FSQ, FSQConfig

LEVELS = [[8, 6, 5], [8, 5, 5, 5], [3, 4, 7]]
both_edges = pytest.mark.parametrize("edges", ["original", "symmetric"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(levels: list[int], edges: str = "symmetric", **settings) -> FSQ:
    return FSQ(FSQConfig(levels=levels, edges=edges, **settings))


def reference_original(x: np.ndarray, levels: list[int]) -> np.ndarray:
    """arXiv 2309.15505's listing in float64 numpy."""
    L = np.array(levels)
    half = (L - 1) * (1 + 1e-3) / 2
    offset = np.where(L % 2 == 0, 0.5, 0.0)
    shift = np.arctanh(offset / half)
    return np.round(np.tanh(x + shift) * half - offset) / (L // 2)


def reference_symmetric(x: np.ndarray, levels: list[int]) -> np.ndarray:
    """arXiv 2411.19842: 2 / (L - 1) * floor((L - 1) (tanh x + 1) / 2 + 1/2) - 1."""
    L = np.array(levels)
    return 2 / (L - 1) * np.floor((L - 1) * (np.tanh(x) + 1) / 2 + 0.5) - 1


def reference_index(values: np.ndarray, levels: list[int]) -> np.ndarray:
    """Rank of each value among the values of its dimension, first dimension least significant."""
    ranks = [np.unique(column, return_inverse=True)[1] for column in values.T]
    return np.ravel_multi_index(tuple(ranks), levels, order="F")


def latent_of(code: Tensor, levels: list[int], edges: str) -> Tensor:
    """A latent whose bounded value is exactly this code: the inverse of both reference formulas."""
    if edges == "symmetric":
        return torch.atanh(code.double()).float()
    L = torch.tensor(levels).double()
    half, offset = (L - 1) * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0).double()
    return (torch.atanh((code * (L // 2) + offset) / half) - torch.atanh(offset / half)).float()


def even_latents(count: int = 200_000) -> Tensor:
    """tanh of them is uniform on (-1, 1)."""
    return torch.atanh(2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1).float()[:, None]


# -- F1 to F4 -------------------------------------------------------------------------------------------------------


@both_edges
@pytest.mark.parametrize("levels", LEVELS)
def test_f1_every_code_comes_back_as_itself(levels, edges):
    quantizer = make(levels, edges).eval()
    out = quantizer(latent_of(quantizer.codebook, levels, edges))
    assert torch.equal(out.indices, torch.arange(math.prod(levels)))
    assert torch.equal(out.z_q, quantizer.codebook)


@both_edges
@pytest.mark.parametrize("levels", LEVELS)
def test_f2_codes_lie_within_1_and_take_exactly_l_values(levels, edges):
    out = make(levels, edges)(4 * torch.randn(20_000, len(levels))).z_q
    assert out.abs().max() <= 1
    assert [len(column.unique()) for column in make(levels, edges).codebook.T] == levels
    rounded = (out * 1e5).round()  # the straight-through sum can be off by one ulp
    assert [len(column.unique()) for column in rounded.T] == levels


def test_f3_paper_sizes_are_those_of_their_levels():
    sizes = [FSQ(FSQConfig(codebook_size=size)).codebook_size for size in (256, 1024, 4096, 16384)]
    assert sizes == [240, 1000, 4375, 15360]


@pytest.mark.parametrize("noise_rate", [0.0, 0.5])
@pytest.mark.parametrize("levels", LEVELS)
def test_f4_symmetric_gradient_is_that_of_tanh(levels, noise_rate):
    z = torch.randn(200, len(levels)).requires_grad_()
    make(levels, noise_rate=noise_rate)(z).z_q.sum().backward()
    torch.testing.assert_close(z.grad, 1 - torch.tanh(z.detach()).square(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_f4_original_gradient_is_that_of_its_bound(levels):
    L = torch.tensor(levels)
    half, offset = (L - 1) * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0)
    z = torch.randn(200, len(levels)).requires_grad_()
    make(levels, "original")(z).z_q.sum().backward()
    slope = 1 - torch.tanh(z.detach() + torch.atanh(offset / half)).square()
    torch.testing.assert_close(z.grad, slope * half / (L // 2), rtol=1e-5, atol=1e-6)


# -- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edges", "reference"), [("original", reference_original), ("symmetric", reference_symmetric)])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_equals_an_independent_numpy_reference(levels, edges, reference, mode):
    z = 1.5 * torch.randn(20_000, len(levels))
    expected = reference(z.double().numpy(), levels)
    out = make(levels, edges).train(mode == "train")(z)
    np.testing.assert_allclose(out.z_q.detach().numpy(), expected, atol=1e-6)
    assert out.indices.tolist() == reference_index(expected, levels).tolist()


@pytest.mark.parametrize(
    ("levels", "usage"), [(4, [0.091, 0.242, 0.380, 0.286]), (5, [0.125, 0.25, 0.25, 0.25, 0.125])]
)
def test_original_edges_get_half_the_mass_of_uniform_p(levels, usage):
    """The shares in the section on FSQ of docs/methods.md."""
    shares = torch.bincount(make([levels], "original").encode(even_latents())) / 200_000
    assert shares.tolist() == pytest.approx(usage, abs=1e-3)


@pytest.mark.parametrize("levels", range(3, 9))
def test_symmetric_edges_get_half_the_mass_of_uniform_p(levels):
    shares = torch.bincount(make([levels]).encode(even_latents())) / 200_000
    inner = 1 / (levels - 1)
    assert shares.tolist() == pytest.approx([inner / 2, *[inner] * (levels - 2), inner / 2], abs=1e-4)


@both_edges
def test_usage_of_uniform_p_is_906_to_967_thousandths_per_dimension(edges):
    for levels in range(3, 9):
        counts = torch.bincount(make([levels], edges).encode(even_latents())).double()
        assert 0.905 < float(torch.special.entr(counts / counts.sum()).sum().exp()) / levels < 0.967


@both_edges
def test_large_latents_take_the_outermost_levels(edges):
    quantizer = make([8, 5], edges)
    assert quantizer.encode(torch.tensor([[-1e6, -1e6], [1e6, 1e6]])).tolist() == [0, 39]


# -- noise ----------------------------------------------------------------------------------------------------------


def test_noise_for_rounding_is_uniform_one_cell_wide():
    """p + U(-1/2, 1/2) / L, as L3AC's SuperFSQ; p = (output + 1) / 2."""
    levels = torch.tensor([8, 5])
    z = 0.3 * torch.randn(50_000, 2)
    noise = ((make([8, 5], noise_rate=1.0)(z).z_q - torch.tanh(z)) / 2 * levels).double()
    assert float(noise.abs().max()) == pytest.approx(0.5, abs=0.001)
    assert float(noise.var()) == pytest.approx(1 / 12, rel=0.02)


def test_noise_rate_is_the_share_of_scalars_that_are_not_rounded():
    quantizer, z = make([8, 5, 5, 5], noise_rate=0.3), torch.randn(20_000, 4)
    out = quantizer(z)
    unrounded = (out.z_q - quantizer.eval()(z).z_q).abs() > 1e-5
    assert float(unrounded.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(unrounded.all(dim=1).float().mean()) == pytest.approx(0.3**4, abs=0.005)
    assert out.indices is None


def test_without_noise_training_gives_what_eval_gives():
    quantizer, z = make([8, 5, 5, 5]), torch.randn(500, 4)
    trained, evaluated = quantizer(z), quantizer.eval()(z)
    torch.testing.assert_close(trained.z_q, evaluated.z_q, rtol=0, atol=1e-6)
    assert torch.equal(trained.indices, evaluated.indices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edges": "round"}, "quantizer.edges is 'round'; choose one of: original, symmetric"),
        ({"noise_rate": -0.1}, "quantizer.noise_rate is -0.1"),
        ({"levels": [8, 1]}, "levels"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FSQ(FSQConfig(**settings))
