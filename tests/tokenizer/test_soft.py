"""Gumbel noise, temperatures, sums over all codes, and chunks, which limit memory without changing results."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base import stochastic as soft
from tokenizer.quantizers.base.quantizer import Quantizer, build_quantizer

N, K, D = 512, 256, 4
SMALL_CHUNK = 16 * K  # MAX_SCORES for chunks of 16 rows
METHODS: list[dict[str, Any]] = [
    {"name": "gm_vq"},
    {"name": "sq_vae"},
    {"name": "gumbel"},
    {"name": "gumbel", "hard": True},
    {"name": "ibq", "entropy_temperature": 1.0},  # with the default every probability is about 0 or 1
]


def named(settings: dict[str, Any]) -> str:
    return "-".join(map(str, settings.values()))


all_methods = pytest.mark.parametrize("settings", METHODS, ids=named)
annealed_methods = pytest.mark.parametrize("settings", METHODS[:-1], ids=named)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def started(settings: dict[str, Any]) -> tuple[Quantizer, Tensor]:
    """A quantizer with given codes, and latents."""
    quantizer = build_quantizer({"codebook_size": K, "dim": D, **settings})
    z = torch.randn(N, quantizer.in_dim)
    quantizer(z)
    return quantizer, z.requires_grad_()


def step(quantizer: Quantizer, z: Tensor) -> list[Tensor]:
    """All outputs and gradients of a training step, with fixed noise and temperature."""
    quantizer.zero_grad()
    quantizer.step.fill_(100)
    z.grad = None
    torch.manual_seed(3)
    out = quantizer(z)
    (out.z_q.square().mean() + sum(out.losses.values())).backward()
    gradients = [leaf.grad for leaf in (z, *quantizer.parameters())]
    return [out.z_q.detach(), *(loss.detach() for loss in out.losses.values()), *gradients]


# -- Gumbel noise ---------------------------------------------------------------------------------------------------


def test_noise_is_finite_whatever_rand_draws():
    """rand returns 0 once in 2^24 numbers, and 1 only by rounding."""
    noise = soft.to_gumbel_(torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0]))
    assert noise.isfinite().all()
    assert noise.tolist() == sorted(noise.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_moments_of_a_gumbel_distribution(dtype):
    noise = soft.gumbel_noise(torch.empty(1_000_000, dtype=dtype))
    assert noise.dtype == dtype
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.005)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)


def test_the_hardest_choice_draws_each_code_as_often_as_its_probability_says():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(200_000, 4)
    y = soft.gumbel_softmax(logits, torch.tensor(1e-3))
    drawn = torch.bincount(y.argmax(dim=1), minlength=4) / len(y)
    torch.testing.assert_close(drawn, logits[0].softmax(dim=0), rtol=0, atol=0.005)
    assert y.max(dim=1).values.mean() > 0.999


def test_noise_carries_no_gradient_and_leaves_the_logits_alone():
    logits = torch.randn(5, 3, requires_grad=True)
    before = logits.detach().clone()
    soft.gumbel_softmax(logits, torch.tensor(0.5)).square().sum().backward()
    assert torch.equal(logits, before)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


# -- temperatures ---------------------------------------------------------------------------------------------------


def steps(*values: int) -> Tensor:
    return torch.tensor(values)


def test_exponential_temperature_starts_and_ends_where_it_should():
    found = soft.exponential_temperature(steps(0, 500, 1000, 5000), 2.0, 0.1, 1000)
    torch.testing.assert_close(found, torch.tensor([2.0, math.sqrt(2.0 * 0.1), 0.1, 0.1]), rtol=0, atol=1e-6)


def test_cosine_temperature_falls_along_a_quarter_of_a_cosine_as_in_the_source():
    """karpathy's cos_anneal: the weight of the end value is 1 - cos(progress pi / 2), in the middle 1 - sqrt(1/2)."""
    found = soft.cosine_temperature(steps(0, 500, 1000, 5000), 1.0, 1 / 16, 1000)
    middle = 1 / 16 + 15 / 16 * math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([1.0, middle, 1 / 16, 1 / 16]), rtol=0, atol=1e-6)


def test_decaying_temperature_falls_by_e_in_1_over_decay_steps_and_never_to_0():
    found = soft.decaying_temperature(steps(0, 100_000, 10**9), 1.0, 1e-5)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(-1), soft.SMALLEST_TEMPERATURE]))


@pytest.mark.parametrize(
    "temperature",
    [
        lambda step: soft.exponential_temperature(step, 2.0, 0.1, 1000),
        lambda step: soft.cosine_temperature(step, 1.0, 1 / 16, 1000),
        lambda step: soft.decaying_temperature(step, 1.0, 1e-3),
    ],
)
def test_temperatures_never_rise(temperature):
    assert (temperature(torch.arange(2000)).diff() <= 0).all()


@annealed_methods
def test_each_training_step_lowers_the_temperature_and_eval_does_not(settings):
    quantizer, z = started(settings)
    quantizer.step.fill_(5000)  # a cosine hardly falls at its start
    first, second = (quantizer(z).metrics["temperature"].item() for _ in range(2))
    quantizer.eval()(z)
    third = quantizer.train()(z).metrics["temperature"].item()
    assert first > second > third
    assert int(quantizer.step) == 5003


@pytest.mark.parametrize(("start", "end", "steps"), [(1.0, 0.0, 10), (0.1, 1.0, 10), (math.nan, 0.1, 10)])
def test_a_temperature_that_does_not_fall_is_refused(start, end, steps):
    with pytest.raises(ValueError, match=rf"temperature_start is {start} and temperature_end {end}; they must satisfy"):
        soft.check_annealing(start, end, steps)


def test_an_annealing_without_steps_is_refused():
    with pytest.raises(ValueError, match="anneal_steps is 0; it must be 1 or more"):
        soft.check_annealing(1.0, 0.1, 0)


# -- sums over all codes --------------------------------------------------------------------------------------------


def test_m2_logits_by_one_product_are_the_direct_ones():
    z, codes, weights = torch.randn(50, 8), torch.randn(30, 8), torch.rand(50, 8)
    direct = -(weights[:, None] * (z[:, None] - codes).square()).sum(dim=2) / 2
    torch.testing.assert_close(soft.gaussian_logits(z, codes, weights), direct, rtol=1e-5, atol=1e-5)


def test_logits_and_distances_keep_their_digits_far_from_zero():
    z, codes, weights = torch.randn(50, 8), torch.randn(30, 8), torch.rand(50, 8)
    p = torch.randn(50, 30).softmax(dim=1)
    near = soft.gaussian_logits(z, codes, weights), soft.expected_distance(z, p, codes)
    far = soft.gaussian_logits(z + 100, codes + 100, weights), soft.expected_distance(z + 100, p, codes + 100)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def test_expected_distance_is_that_of_all_distances():
    z, codes, p = torch.randn(50, 8).double(), torch.randn(30, 8).double(), torch.randn(50, 30).double().softmax(dim=1)
    direct = (p * torch.cdist(z, codes).square()).sum(dim=1)
    torch.testing.assert_close(soft.expected_distance(z, p, codes), direct)


def test_expected_distance_is_never_negative():
    codes = 1000 * torch.randn(30, 8)
    assert soft.expected_distance(codes, torch.eye(30), codes).min() >= 0


def test_gradients_of_logits_and_distances_are_those_of_finite_differences():
    z, codes, third = (torch.randn(n, 4).double().requires_grad_() for n in (5, 4, 5))
    assert torch.autograd.gradcheck(soft.gaussian_logits, (z, codes, third))
    # from logits: p must sum to 1
    assert torch.autograd.gradcheck(lambda a, b, c: soft.expected_distance(a, b.softmax(dim=1), c), (z, third, codes))


def test_entropy_of_a_certain_and_of_an_even_choice():
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(soft.entropy(p), torch.tensor([0.0, math.log(4)]))


def test_entropy_has_a_finite_gradient_where_a_probability_is_zero():
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    soft.entropy(p).backward()
    assert p.grad.isfinite().all()


def test_m1_entropy_of_the_mean_is_mean_entropy_plus_mutual_information():
    """float64; the information as the mean KL(q(c|x) || mean q), computed by torch.distributions."""
    q = (3 * torch.randn(200, 16)).double().softmax(dim=1)
    mean = torch.distributions.Categorical(q.mean(dim=0))
    information = torch.distributions.kl_divergence(torch.distributions.Categorical(q), mean).mean()
    found = soft.entropy(q.mean(dim=0)) - soft.entropy(q).mean()
    assert found.item() == pytest.approx(information.item(), abs=1e-10)


def test_m1_log_k_minus_entropy_is_kl_to_the_uniform():
    q = torch.randn(16).double().softmax(dim=0)
    uniform = torch.distributions.Categorical(torch.full((16,), 1 / 16).double())
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(q), uniform)
    assert math.log(16) - soft.entropy(q).item() == pytest.approx(expected.item(), abs=1e-10)


def test_mean_over_no_rows_is_zero():
    assert soft.mean_over_all_rows(torch.zeros(3), 0).tolist() == [0, 0, 0]


# -- chunks ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor of any operation, including backward."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def num_saved(quantizer: Quantizer, z: Tensor) -> int:
    """Number of elements that a training forward keeps for backward."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = quantizer(z)
    assert out.z_q.requires_grad
    return sum(sizes.values())


@all_methods
def test_no_tensor_of_a_training_step_has_n_times_k_elements(settings, monkeypatch):
    quantizer, z = started(settings)
    monkeypatch.setattr(soft, "MAX_SCORES", SMALL_CHUNK)
    monkeypatch.setattr(soft, "MAX_KEPT", 0)
    with Largest() as largest:
        step(quantizer, z)
    assert 16 * K <= largest.num_elements < N * K / 8


@all_methods
def test_nothing_of_a_chunk_is_kept_for_backward(settings, monkeypatch):
    quantizer, z = started(settings)
    monkeypatch.setattr(soft, "MAX_SCORES", SMALL_CHUNK)
    monkeypatch.setattr(soft, "MAX_KEPT", 0)
    assert num_saved(quantizer, z) < N * K / 4
    monkeypatch.setattr(soft, "MAX_KEPT", N * K)
    assert num_saved(quantizer, z) > N * K  # shows that the measurement works


@all_methods
def test_chunks_change_no_output_and_no_gradient(settings, monkeypatch):
    """On the CPU, whose generator draws numbers one by one. A GPU draws different noise in different chunks."""
    quantizer, z = started(settings)
    monkeypatch.setattr(soft, "MAX_KEPT", N * K)
    whole = step(quantizer, z)
    monkeypatch.setattr(soft, "MAX_SCORES", SMALL_CHUNK)
    monkeypatch.setattr(soft, "MAX_KEPT", 0)
    torch.testing.assert_close(step(quantizer, z), whole, rtol=1e-4, atol=1e-6)


@all_methods
def test_chunks_change_no_index_and_no_share(settings, monkeypatch):
    quantizer, z = started(settings)
    indices, shares = quantizer.encode(z), quantizer.code_shares(z)
    monkeypatch.setattr(soft, "MAX_SCORES", SMALL_CHUNK)
    assert torch.equal(quantizer.encode(z), indices)
    torch.testing.assert_close(quantizer.code_shares(z), shares)


@all_methods
def test_backward_leaves_the_stream_of_random_numbers_as_it_was(settings):
    quantizer, z = started(settings)
    out = quantizer(z)
    before = torch.get_rng_state()
    out.z_q.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_codebook_larger_than_a_chunk_is_taken_row_by_row():
    assert soft.rows_per_chunk(2 * soft.MAX_SCORES) == 1


# -- every soft quantizer --------------------------------------------------------------------------------------------


@all_methods
def test_indices_of_single_latents_are_those_of_the_batch(settings):
    quantizer, z = started({**settings, "dim": 32})
    assert torch.equal(torch.cat([quantizer.encode(part) for part in z.split(1)]), quantizer.encode(z))


@all_methods
def test_untrained_codes_are_refused(settings):
    quantizer = build_quantizer({"codebook_size": K, "dim": D, **settings})
    z = torch.randn(3, quantizer.in_dim)
    for use in (quantizer.encode, quantizer.code_shares, quantizer.fit, quantizer.eval()):
        with pytest.raises(CodebookMissing, match="was never trained"):
            use(z)


@all_methods
def test_an_empty_first_batch_is_no_training(settings):
    quantizer = build_quantizer({"codebook_size": K, "dim": D, **settings})
    assert quantizer(torch.empty(0, quantizer.in_dim)).z_q.shape == (0, D)
    with pytest.raises(CodebookMissing):
        quantizer.encode(torch.randn(3, quantizer.in_dim))


@all_methods
def test_only_gm_vq_has_soft_shares_since_only_its_paper_reports_their_perplexity(settings):
    quantizer, z = started(settings)
    shares = quantizer.code_shares(z.reshape(2, N // 2, -1))
    assert shares.shape == (K,)
    assert not shares.requires_grad
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    are_counts = torch.allclose(shares * N, (shares * N).round(), atol=1e-3)
    assert are_counts == (settings["name"] != "gm_vq")


@all_methods
def test_soft_perplexity_is_that_of_the_mean_probabilities(settings):
    quantizer, z = started(settings)
    expected = soft.entropy(quantizer._logits(z, quantizer.codes).softmax(dim=1).mean(dim=0)).exp()
    found = quantizer(z).metrics["soft_perplexity"]
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@all_methods
def test_every_parameter_has_a_gradient(settings):
    """DDP waits forever for a parameter without a gradient."""
    quantizer, z = started(settings)
    step(quantizer, z)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantizer.parameters())


@all_methods
def test_training_goes_on_from_the_learned_codes_after_fit(settings):
    quantizer, z = started(settings)
    quantizer.fit(z.detach())
    frozen = quantizer.codebook.clone()
    quantizer.embedding.data.add_(1)
    assert torch.equal(quantizer.codebook, frozen)
    quantizer(z)
    assert torch.equal(quantizer.codebook, quantizer.embedding)


@all_methods
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e6])
def test_extreme_latents_at_the_lowest_temperature_stay_finite(settings, scale, monkeypatch):
    quantizer, z = started(settings)
    monkeypatch.setattr(quantizer, "_temperature", lambda step: torch.tensor(soft.SMALLEST_TEMPERATURE))
    assert all(tensor.isfinite().all() for tensor in step(quantizer, (scale * z.detach()).requires_grad_()))
