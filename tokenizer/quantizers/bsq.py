"""BSQ: binary spherical quantization, arXiv 2406.07548 (official: zhaoyue-zephyrus/bsq-vit). LFQ on the unit sphere.

Legend: u = z / |z| [N, d], codes [2^d, d] with entries +-1/sqrt(d), all of length 1.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.lfq import LFQ, LFQConfig, entropy_of_mean_bits

SMALLEST_LENGTH = 1e-6  # of a latent before normalisation: keeps the gradient finite at 0


@dataclass
class BSQConfig(LFQConfig):
    """inverse_temperature: of the probabilities in the entropy losses only; the code is always given by the signs."""

    inverse_temperature: float = 1.0


@QUANTIZERS.register("bsq")
class BSQ(LFQ):
    """The code is the signs of u divided by sqrt(d), with a straight-through gradient to u. The distance from u to its
    code is at most sqrt(2 - 2/sqrt(d)), so "commitment" has weight 0, as in the official configurations.

    The losses are LFQ's, with p = softmax over codes c of 2 inverse_temperature u.c. The entropy of a token is exactly
    the sum of the entropies of its bits. For the entropy of the mean that sum is an approximation (eq. 8), used for
    every d.

    Differs: the first dimension is the least significant bit; in the official code it is the most significant. The
    official code also divides the entropies by inverse_temperature, and lowers their weight from 3 times to 1 times
    its value over the first 2,000 steps.
    """

    Config = BSQConfig
    default_loss_weights = {"entropy_per_token": 0.1, "entropy_of_mean": 0.1, "commitment": 0.0}

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        return super()._train_forward(_on_sphere(z))

    def _logits(self, z: Tensor) -> Tensor:
        return super()._logits(_on_sphere(z)) / math.sqrt(self.dim)

    def _entropy_of_mean(self, logits: Tensor) -> Tensor:
        return entropy_of_mean_bits(logits.sigmoid())

    def _decode(self, indices: Tensor) -> Tensor:
        return super()._decode(indices) / math.sqrt(self.dim)


def _on_sphere(z: Tensor) -> Tensor:
    return normalize(z, dim=1, eps=SMALLEST_LENGTH)
