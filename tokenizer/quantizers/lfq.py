"""LFQ: lookup-free quantization, arXiv 2310.05737 (MAGVIT-v2). One bit per dimension, trained with entropy losses.

Legend: z [N, d] latents, bits [N, d] with bit i = 1 where z_i > 0, p [N, d] the probabilities of those bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tokenizer.quantizers.base.levels import MixedRadix
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.stochastic import entropy, mean_over_all_rows
from tokenizer.quantizers.base.straight_through import straight_through

MAX_JOINT_DIM = 14  # up to this, the entropy of the mean is computed over all 2^d codes, with N 2^d multiplications


@dataclass
class LFQConfig:
    """inverse_temperature: of the probabilities in the entropy losses only; the code is always given by the signs."""

    codebook_size: int = 1024
    inverse_temperature: float = 100.0

    def __post_init__(self) -> None:
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            below = max(1, self.codebook_size.bit_length() - 1) if self.codebook_size > 0 else 1
            raise ValueError(
                f"quantizer.codebook_size is {self.codebook_size}; it must be a power of two: "
                f"choose {2**below} or {2 ** (below + 1)}"
            )
        if self.inverse_temperature <= 0:
            raise ValueError(f"quantizer.inverse_temperature is {self.inverse_temperature}; it must be above 0")


@QUANTIZERS.register("lfq")
class LFQ(Quantizer):
    """Each dimension becomes +1 if z > 0, otherwise -1; the index is the binary number of these bits.

    Differs: the first dimension is the least significant bit, as in all our scalar quantizers; in the official code
    and its ports it is the most significant. The entropies have weight .02; the authors and the ports use .1 together
    with a perceptual loss and a discriminator. With only L1, .1 costs 0.9 dB of PSNR (configs/quantizers/lfq.yaml).

    Losses, in nats: "entropy_per_token" is E H(p), small if each token clearly prefers one code; "entropy_of_mean" is
    -H(E p), small if all codes are used equally. p = softmax over codes c of 2 inverse_temperature z.c.
    """

    Config = LFQConfig
    default_loss_weights = {"entropy_per_token": 0.02, "entropy_of_mean": 0.02, "commitment": 0.25}

    def __init__(self, config: LFQConfig):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.dim = self.in_dim = config.codebook_size.bit_length() - 1
        self.index_levels = (2,) * self.dim
        self.radix = MixedRadix(list(self.index_levels))

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        indices = self._encode(z)
        codes = self._decode(indices)
        logits = self._logits(z)
        losses = {
            "entropy_per_token": binary_entropy(logits).sum()
            / max(1, len(z)),  # the bits are independent, so entropies add up
            "entropy_of_mean": -self._entropy_of_mean(logits),
            "commitment": mean_squared(z - codes),
        }
        return QuantizerOutput(straight_through(z, codes), indices, losses)

    def _logits(self, z: Tensor) -> Tensor:
        """Logits of each bit being 1: 2 inverse_temperature (z_i - (-z_i)). The logit of a code is a sum over dims, so
        the bits are independent and p is a product over them.
        """
        return 4 * self.config.inverse_temperature * z

    def _entropy_of_mean(self, logits: Tensor) -> Tensor:
        """Entropy of the mean p over all ranks. Differs: above 2^14 codes, the sum of the entropies of the mean bits.

        The sum is an upper bound, because the bits of the mean are not independent. Other implementations also use it.
        """
        p = logits.sigmoid()
        if self.dim <= MAX_JOINT_DIM:
            return entropy(mean_over_all_rows(joint_sums(p), len(p)))
        return entropy_of_mean_bits(p)

    def _encode(self, z: Tensor) -> Tensor:
        return self.radix.pack((z > 0).long())

    def _decode(self, indices: Tensor) -> Tensor:
        return 2 * self.radix.unpack(indices).float() - 1


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of bits with these logits. Exact, with a finite gradient for logits of any size."""
    size = logits.abs()
    return softplus(-size) + size * torch.sigmoid(-size)


def entropy_of_mean_bits(p: Tensor) -> Tensor:
    """Entropy of each bit's mean probability over the rows of all ranks, summed over bits: p [N, d] -> []."""
    share = mean_over_all_rows(p.sum(dim=0), len(p))
    return entropy(torch.stack([share, 1 - share], dim=1)).sum() if len(p) else share.sum()


def joint_sums(p: Tensor) -> Tensor:
    """Sum over rows of the probabilities of all 2^d codes of d independent bits: [N, d] -> [2^d].

    Computed as one matrix product of the codes of both halves of the bits, which needs memory for N 2^(d/2) numbers.
    """
    half = p.shape[1] // 2
    return (joint(p[:, half:]).T @ joint(p[:, :half])).flatten()


def joint(p: Tensor) -> Tensor:
    """Probabilities of all codes of h independent bits, the first bit least significant: [N, h] -> [N, 2^h]."""
    codes = p.new_ones(len(p), 1)
    for bit in p.unbind(dim=1):
        codes = torch.cat([codes * (1 - bit[:, None]), codes * bit[:, None]], dim=1)
    return codes
