"""Shared code of quantizers that train with a soft choice among all codes: Gumbel noise, temperatures, chunked sums.

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
from tokenizer.quantizers.base.codebook import CodebookQuantizer
from tokenizer.quantizers.base.quantizer import QuantizerOutput

MAX_SCORES = 2**21  # floats of one [n, K] tensor (8 MB); six exist at once. Larger ones are slower on a CPU
MAX_KEPT = 2**23  # floats of an [N, K] tensor (32 MB) up to which chunks are kept for backward, a third faster
SMALLEST_TEMPERATURE = 1e-3  # below it the choice is practically hard, and 1 / temperature overflows
SMALLEST_UNIFORM, LARGEST_UNIFORM = 2.0**-25, 1 - 2.0**-24  # torch.rand can return 0, and can round to 1


class SoftQuantizer(CodebookQuantizer):
    """In training, a soft choice of codes by q(c|z) = softmax(logits); afterwards the most likely code.

    A subclass defines `_logits`, `_temperature` and `_soft_forward`. `embedding` holds the trained codes.
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
        """log q(c|z), up to a constant per row: [n, in_dim] -> [n, K]."""
        raise AssertionError(f"{type(self).__name__} lacks _logits")

    def _temperature(self, step: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} lacks _temperature")

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        raise AssertionError(f"{type(self).__name__} lacks _soft_forward")

    def _initialise(self, z: Tensor) -> None:
        """Initialises `embedding` from the first batch. The default leaves it random."""

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
            raise CodebookMissing(f"this {self.name} was never trained: its codes are still random; train it first")
        return self.embedding

    @torch.no_grad()
    def _encode(self, z: Tensor) -> Tensor:
        """The most likely code. Chunk sizes depend only on K, so a latent has the same index in every batch."""
        codes = self.codes
        return torch.cat([argmax_rows(self._logits(part, codes)) for part in self._split(z)])

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split(rows_per_chunk(self.codebook_size))


# -- chunks ---------------------------------------------------------------------------------------------------------


def rows_per_chunk(codebook_size: int) -> int:
    return max(1, MAX_SCORES // codebook_size)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], z: Tensor, codebook_size: int) -> list[Any]:
    """Applies function to chunks of rows of z. For each of its results, returns the tuple of the chunks' results.

    For many rows, backward recomputes the function with the same random numbers, so that only one chunk's [n, K]
    tensors are in memory.
    """
    parts = z.split(rows_per_chunk(codebook_size))
    if len(z) * codebook_size <= MAX_KEPT:
        results = [function(part) for part in parts]
    else:
        results = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=True) for part in parts]
    return list(zip(*results, strict=True))


# -- the soft choice ------------------------------------------------------------------------------------------------


def gumbel_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax((logits + g) / temperature) with standard Gumbel noise g (arXiv 1611.01144): [N, K] -> [N, K]."""
    return gumbel_noise(logits).add_(logits).div_(temperature).softmax(dim=1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise, always finite.

    It uses torch.rand, which is four times as fast as exponential_ on a CPU.
    """
    return to_gumbel_(torch.rand_like(like, requires_grad=False))


def to_gumbel_(uniform: Tensor) -> Tensor:
    """-ln(-ln u), in place. u = 0 and 1 give -2.9 and 16.6, the ends of the range that float32 can draw."""
    return uniform.clamp_(SMALLEST_UNIFORM, LARGEST_UNIFORM).log_().neg_().log_().neg_()


def gaussian_logits(z: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """-1/2 sum_l w_l (z_l - c_l)^2 as one matrix product: z, weights [N, D], codes [K, D] -> [N, K]."""
    z, codes = _centered(z, codes)
    weighted = weights * z
    constant = -(weighted * z).sum(dim=1, keepdim=True) / 2
    left, right = torch.cat([weighted, weights], dim=1), torch.cat([codes, -codes.square() / 2], dim=1)
    return torch.addmm(constant, left, right.T)


def expected_distance(z: Tensor, p: Tensor, codes: Tensor) -> Tensor:
    """sum_c p_c |z - c|^2 without an [N, K] distance matrix: |z|^2 - 2 z.(pM) + p.|M|^2. z [N, D], p [N, K] -> [N]."""
    z, codes = _centered(z, codes)
    distance = z.square().sum(dim=1) - 2 * (z * (p @ codes)).sum(dim=1) + p @ codes.square().sum(dim=1)
    return distance.clamp(min=0)  # rounding can make it negative


def _centered(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts both so that the codes have mean 0: products of large numbers would lose precision."""
    center = codes.detach().mean(dim=0)
    return z - center, codes - center


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p in nats, with 0 ln 0 = 0 and a finite gradient there: [..., K] -> [...]."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def mean_over_all_rows(total: Tensor, count: int) -> Tensor:
    """The mean over the rows of all ranks, with gradient, from this rank's sum [K] over `count` rows."""
    both = mean_across_ranks(torch.cat([total, total.new_full((1,), count)]))
    return both[:-1] / both[-1].clamp(min=1e-6)  # 0 if no rank has any rows


# -- temperatures: pure functions of the step -----------------------------------------------------------------------


def exponential_temperature(step: Tensor, start: float, end: float, anneal_steps: int) -> Tensor:
    """Falls exponentially from start at step 0 to end at anneal_steps, then stays there."""
    return (start * (-math.log(start / end) / anneal_steps * step).exp()).clamp(min=end)


def cosine_temperature(step: Tensor, start: float, end: float, anneal_steps: int) -> Tensor:
    """Falls along a quarter of a cosine from start at step 0 to end at anneal_steps, then stays there.

    Source: `cos_anneal` of karpathy/deep-vector-quantization. It falls slowly at the start and fastest at the end.
    """
    progress = (step / anneal_steps).clamp(max=1)
    return end + (start - end) * (math.pi / 2 * progress).cos()


def decaying_temperature(step: Tensor, start: float, decay: float) -> Tensor:
    """start * exp(-decay * step), but never below SMALLEST_TEMPERATURE."""
    return (start * (-decay * step).exp()).clamp(min=SMALLEST_TEMPERATURE)


def check_annealing(start: float, end: float, anneal_steps: int) -> None:
    """Raises ValueError if temperature_start is below temperature_end, or temperature_end too small."""
    if not SMALLEST_TEMPERATURE <= end <= start < math.inf:
        raise ValueError(
            f"quantizer.temperature_start is {start} and temperature_end {end}; "
            f"they must satisfy start >= end >= {SMALLEST_TEMPERATURE}"
        )
    if anneal_steps < 1:
        raise ValueError(f"quantizer.anneal_steps is {anneal_steps}; it must be 1 or more")
