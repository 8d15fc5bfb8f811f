"""BSQ: binary spherical quantization, arXiv 2406.07548 (official: zhaoyue-zephyrus/bsq-vit). LFQ on the unit sphere.

Legend: u = z / |z| [N, d], codes [2^d, d] of entries +-1/sqrt(d), all of length 1.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.lfq import LFQ, LFQConfig, entropy_of_mean_bits

SMALLEST_LENGTH = 1e-6  # of a latent on its way to the sphere: keeps the gradient finite at 0


@dataclass
class BSQConfig(LFQConfig):
    """inverse_temperature: of the probabilities in the entropy losses alone; the code is always the signs."""

    inverse_temperature: float = 1.0


@QUANTIZERS.register("bsq")
class BSQ(LFQ):
    """The signs of u, each 1/sqrt(d) long, and straight-through to u. No code lies further from u than
    sqrt(2 - 2/sqrt(d)), so that "commitment" needs no weight, as in the official configurations.

    Losses are LFQ's, with p = softmax over codes c of 2 inverse_temperature u.c: the entropy of a token is exactly the
    sum of its bits' entropies, and so is, approximately, the entropy of the mean (eq. 8), whatever d.

    Differs: the first dimension is the least significant bit; in the official code it is the most significant. That
    code also divides the entropies by inverse_temperature and starts at 3 times their weight, down to 1 at step 2,000.
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
