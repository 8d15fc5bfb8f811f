"""Gumbel-softmax VQ-VAE, arXiv 1611.01144 and 2102.12092, as in karpathy/deep-vector-quantization and
taming-transformers.

Legend: z [N, d] latents, e [K, d] codes, q [N, K] their probabilities, y [N, K] the choice.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tokenizer.quantizers.base.codebook import check_codebook_shape
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.base.stochastic import (
    SoftQuantizer,
    check_annealing,
    cosine_temperature,
    entropy,
    gumbel_softmax,
    in_chunks,
    mean_over_all_rows,
)
from tokenizer.quantizers.base.straight_through import straight_through

PIXEL_VARIANCE = 0.06327039811675479  # of CIFAR-10 in -0.5..0.5; karpathy's code divides the squared error by it


@dataclass
class GumbelConfig:
    """hard: the decoder gets one code with the gradient of the soft choice (taming), instead of a mixture (karpathy).

    anneal_steps: from temperature_start to temperature_end, along a quarter of a cosine (150,000 in karpathy's code).
    """

    codebook_size: int = 1024
    dim: int = 64
    hard: bool = False
    temperature_start: float = 1.0
    temperature_end: float = 1 / 16
    anneal_steps: int = 10_000

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        check_annealing(self.temperature_start, self.temperature_end, self.anneal_steps)


@QUANTIZERS.register("gumbel")
class Gumbel(SoftQuantizer):
    """A linear layer computes the logit of each code. There is no distance, so the chosen code need not be the nearest.

    Loss "kl" is the mean over tokens of KL(q || uniform). karpathy's code uses a weight of 5e-4 with MSE / (2 x
    0.0633), the variance of CIFAR-10's pixels; with our plain MSE that is 6.3e-5. Differs: the weight is constant,
    while that code ramps it up over 5,000 steps. The frozen tokenizer takes the most likely code, while both official
    codes sample one.
    """

    Config = GumbelConfig
    default_loss_weights = {"kl": 5e-4 * 2 * PIXEL_VARIANCE}

    def __init__(self, config: GumbelConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        self.projection = nn.Linear(config.dim, config.codebook_size)

    def _temperature(self, step: Tensor) -> Tensor:
        config = self.config
        return cosine_temperature(step, config.temperature_start, config.temperature_end, config.anneal_steps)

    def _logits(self, z: Tensor, codes: Tensor) -> Tensor:
        return self.projection(z)

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        mixed = in_chunks(lambda part: self._mix(part, temperature), z, self.codebook_size)
        shares = mean_over_all_rows(sum(mixed[2]).detach(), len(z))
        losses = {"kl": sum(mixed[1]) / max(1, len(z))}
        return QuantizerOutput(torch.cat(mixed[0]), losses=losses, metrics=self._metrics(temperature, shares))

    def _mix(self, z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For one chunk: z_q [n, d], and the sums over n of sum_k q_k ln(K q_k) and of q [K]."""
        logits = self._logits(z, self.embedding)
        q, y = logits.softmax(dim=1), gumbel_softmax(logits, temperature)
        if self.config.hard:
            y = straight_through(y, one_hot(y.argmax(dim=1), self.codebook_size).to(y.dtype))
        return y @ self.embedding, (math.log(self.codebook_size) - entropy(q)).sum(), q.sum(dim=0)
