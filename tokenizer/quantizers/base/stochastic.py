"""What the quantizers share that train on a soft choice among all codes: Gumbel noise, temperatures, sums in chunks.

Legend: z [N, D] latents, codes [K, D], logits and probabilities [N, K].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.clustering.neighbors import argmax_rows
from tokenizer.distributed import mean_across_ranks
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import TableQuantizer
from tokenizer.quantizers.base.quantizer import QuantizerOutput

MAX_SCORES = 2**21  # floats of one [n, K] tensor (8 MB), of which six live at once; larger ones are slower on a CPU
MAX_KEPT = 2**23  # floats of an [N, K] tensor (32 MB) up to which the chunks are kept for backward: a third faster
SMALLEST_TEMPERATURE = 1e-3  # below, the choice is as good as hard, and 1 / temperature soon overflows
SMALLEST_UNIFORM, LARGEST_UNIFORM = 2.0**-25, 1 - 2.0**-24  # torch.rand gives 0, and may round to 1


class SoftQuantizer(TableQuantizer):
    """While it trains, a code is drawn from q(c|z) = softmax(logits) softly; afterwards it is the likeliest one.

    A subclass gives `_logits`, `_temperature` and `_soft_forward`, which reads `embedding`, the codes that train.
    """

    step: Tensor
    initialised: Tensor
    training_state = ("step",)

    def __init__(self, codebook_size: int, dim: int):
        super().__init__(codebook_size, dim)
        self.embedding = nn.Parameter(torch.randn(codebook_size, dim))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("initialised", torch.tensor(False))

    def _logits(self, z: Tensor, codes: Tensor) -> Tensor:
        """log q(c|z) but for a constant per row: [n, in_dim] -> [n, K]."""
        raise AssertionError(f"{type(self).__name__} lacks _logits")

    def _temperature(self, step: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} lacks _temperature")

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        raise AssertionError(f"{type(self).__name__} lacks _soft_forward")

    def _initialise(self, z: Tensor) -> None:
        """Sets `embedding` by the first batch, where a method does so."""

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        self._thaw()
        if len(z) and not self.initialised:
            self._initialise(z)
            self.initialised.fill_(True)
        temperature = self._temperature(self.step)
        self.step.add_(1)
        return self._soft_forward(z, temperature)

    def _metrics(self, temperature: Tensor, shares: Tensor) -> dict[str, Tensor]:
        return {"temperature": temperature, "soft_perplexity": entropy(shares.detach()).exp()}

    def _live_codes(self) -> Tensor:
        if not self.initialised:
            raise CodebookMissing(f"this {self.name} was never trained: its codes mean nothing yet")
        return self.embedding

    @torch.no_grad()
    def _encode(self, z: Tensor) -> Tensor:
        """The likeliest code. Chunks depend on K alone, so that a latent has the same index in every batch."""
        codes = self.codes
        return torch.cat([argmax_rows(self._logits(part, codes)) for part in self._split(z)])

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split(rows_per_chunk(self.codebook_size))


# -- chunks ---------------------------------------------------------------------------------------------------------


def rows_per_chunk(codebook_size: int) -> int:
    return max(1, MAX_SCORES // codebook_size)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], z: Tensor, codebook_size: int) -> list[Any]:
    """function over chunks of the rows of z: for each of its results, the tuple of the chunks' results.

    Of many rows, backward runs the function again, with the same random numbers, so that no [n, K] tensor outlives its
    chunk.
    """
    parts = z.split(rows_per_chunk(codebook_size))
    if len(z) * codebook_size <= MAX_KEPT:
        done = [function(part) for part in parts]
    else:
        done = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=True) for part in parts]
    return list(zip(*done, strict=True))


# -- the soft choice ------------------------------------------------------------------------------------------------


def gumbel_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax((logits + g) / temperature) with standard Gumbel noise g (arXiv 1611.01144): [N, K] -> [N, K]."""
    return gumbel_noise(logits).add_(logits).div_(temperature).softmax(dim=1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise, always finite. From torch.rand: exponential_ takes four times as long on a CPU."""
    return to_gumbel_(torch.rand_like(like, requires_grad=False))


def to_gumbel_(uniform: Tensor) -> Tensor:
    """-ln(-ln u), in place. What u is 0 or 1 gives noise of -2.9 and 16.6, the ends of what float32 could draw."""
    return uniform.clamp_(SMALLEST_UNIFORM, LARGEST_UNIFORM).log_().neg_().log_().neg_()


def gaussian_logits(z: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """-1/2 sum_l w_l (z_l - c_l)^2 as one matrix product: z, weights [N, D], codes [K, D] -> [N, K]."""
    z, codes = _centered(z, codes)
    weighted = weights * z
    constant = -(weighted * z).sum(dim=1, keepdim=True) / 2
    left, right = torch.cat([weighted, weights], dim=1), torch.cat([codes, -codes.square() / 2], dim=1)
    return torch.addmm(constant, left, right.T)


def expected_distance(z: Tensor, p: Tensor, codes: Tensor) -> Tensor:
    """sum_c p_c |z - c|^2 without any distance: |z|^2 - 2 z.(pM) + p.|M|^2. z [N, D], p [N, K] -> [N]."""
    z, codes = _centered(z, codes)
    distance = z.square().sum(dim=1) - 2 * (z * (p @ codes)).sum(dim=1) + p @ codes.square().sum(dim=1)
    return distance.clamp(min=0)  # rounding


def _centered(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved so that codes have mean 0: products of large numbers would lose the digits of a distance."""
    center = codes.detach().mean(dim=0)
    return z - center, codes - center


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p in nats, with 0 ln 0 = 0 and a finite gradient there: [..., K] -> [...]."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def mean_over_all_rows(total: Tensor, count: int) -> Tensor:
    """The mean over all ranks' rows, with gradient, from each rank's sum [K] over its own `count` rows."""
    both = mean_across_ranks(torch.cat([total, total.new_full((1,), count)]))
    return both[:-1] / both[-1].clamp(min=1e-6)  # 0 where no rank has any row


# -- temperatures: pure functions of the step -----------------------------------------------------------------------


def exponential_temperature(step: Tensor, start: float, end: float, anneal_steps: int) -> Tensor:
    """start at step 0, falling exponentially to end at anneal_steps, and there it stays."""
    return (start * (-math.log(start / end) / anneal_steps * step).exp()).clamp(min=end)


def cosine_temperature(step: Tensor, start: float, end: float, anneal_steps: int) -> Tensor:
    """start at step 0, falling along a quarter of a cosine to end at anneal_steps, and there it stays.

    Source: `cos_anneal` of karpathy/deep-vector-quantization. It falls slowly at first and fastest at the end.
    """
    progress = (step / anneal_steps).clamp(max=1)
    return end + (start - end) * (math.pi / 2 * progress).cos()


def decaying_temperature(step: Tensor, start: float, decay: float) -> Tensor:
    """start * exp(-decay * step), but never below SMALLEST_TEMPERATURE."""
    return (start * (-decay * step).exp()).clamp(min=SMALLEST_TEMPERATURE)


def check_annealing(start: float, end: float, anneal_steps: int) -> None:
    """Raises ValueError on temperatures that do not fall, or fall to nothing."""
    if not SMALLEST_TEMPERATURE <= end <= start < math.inf:
        raise ValueError(
            f"quantizer.temperature_start is {start} and temperature_end {end}; "
            f"allowed is start >= end >= {SMALLEST_TEMPERATURE}"
        )
    if anneal_steps < 1:
        raise ValueError(f"quantizer.anneal_steps is {anneal_steps}; it must be 1 or more")
