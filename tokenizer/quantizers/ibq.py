"""IBQ: index backpropagation quantization, arXiv 2412.02692 (official: TencentARC/SEED-Voken, src/IBQ).

Legend: z [N, d] latents, e [K, d] codes, p [N, K] = softmax of the logits z.e, q [N] indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.clustering.neighbors import argmax_rows
from tokenizer.quantizers.base.codebook import check_codebook_shape
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.stochastic import SoftQuantizer, entropy, in_chunks, mean_over_all_rows


@dataclass
class IBQConfig:
    """entropy_temperature: of the probabilities in the entropy losses only; the choice itself has temperature 1."""

    codebook_size: int = 1024
    dim: int = 64
    entropy_temperature: float = 0.01

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        if self.entropy_temperature <= 0:
            raise ValueError(f"quantizer.entropy_temperature is {self.entropy_temperature}; it must be above 0")


@QUANTIZERS.register("ibq")
class IBQ(SoftQuantizer):
    """Chooses the code with the largest dot product. In backward the choice has the gradient of p, so every code moves.

    Losses, as means over elements: "quantization" is |z_q - z|^2 with a gradient through the choice; "commitment" and
    "codebook" are VQ-VAE's. In nats: "entropy_per_token" is E H(p') and "entropy_of_mean" is -H(E p'), where
    p' = softmax(z.e / entropy_temperature).

    Differs: the paper has weights of 1 for "codebook" and .25 for "commitment" (SEED-Voken issue 60); the official code
    has them the other way round, and we follow the code. It also adds 1e-5 to the mean probabilities in the logarithm.
    """

    Config = IBQConfig
    default_loss_weights = {
        "quantization": 1.0,
        "commitment": 1.0,
        "codebook": 0.25,
        "entropy_per_token": 0.05,
        "entropy_of_mean": 0.05,
    }

    def __init__(self, config: IBQConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config

    def _temperature(self, step: Tensor) -> Tensor:
        return torch.ones_like(step, dtype=torch.float32)

    def _logits(self, z: Tensor, codes: Tensor) -> Tensor:
        return z @ codes.T

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        z_q, indices, entropies, sharp, soft = in_chunks(self._choose, z, self.codebook_size)
        z_q, indices = torch.cat(z_q), torch.cat(indices)
        e_q = self.embedding[indices]
        losses = {
            "quantization": mean_squared(z_q - z),
            "commitment": mean_squared(z - e_q.detach()),
            "codebook": mean_squared(z.detach() - e_q),
            "entropy_per_token": sum(entropies) / max(1, len(z)),
            "entropy_of_mean": -entropy(mean_over_all_rows(sum(sharp), len(z))),
        }
        shares = mean_over_all_rows(sum(soft).detach(), len(z))
        return QuantizerOutput(z_q, indices, losses, self._metrics(temperature, shares))

    def _choose(self, z: Tensor) -> tuple[Tensor, ...]:
        """For one chunk: z_q [n, d], q [n], and the sums over n of H(p'), of p' [K] and of p [K]."""
        logits = self._logits(z, self.embedding)
        p, sharp = logits.softmax(dim=1), (logits / self.config.entropy_temperature).softmax(dim=1)
        q = argmax_rows(logits.detach())
        # equals (one_hot - sg(p) + p) e without the [n, K] one_hot; p gets its gradient through constant codes
        choice = p @ self.embedding.detach()
        z_q = self.embedding[q] + (choice - choice.detach())
        return z_q, q, entropy(sharp).sum(), sharp.sum(dim=0), p.sum(dim=0).detach()
