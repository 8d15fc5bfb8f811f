"""SQ-VAE, arXiv 2205.07547, variant Gaussian I of sony/sqvae: one learned variance, which falls during training.

Legend: z [N, d] latents, e [K, d] codes, s = 1 + exp(theta) the variance, p [N, K] the codes' probabilities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.quantizers.base.codebook import check_codebook_shape
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.base.stochastic import (
    SMALLEST_TEMPERATURE,
    SoftQuantizer,
    decaying_temperature,
    entropy,
    gumbel_softmax,
    in_chunks,
    mean_over_all_rows,
)

FIRST_THETA = math.log(20.0)


@dataclass
class SQVAEConfig:
    """temperature_decay: decay rate of the temperature per step. theta_start: initial theta; ln 20 in the official
    code.

    theta_lr: factor of train.lr for theta; 1 in the official code. Adam moves theta by at most about its learning rate
    per step. In a few thousand steps the variance would hardly change and the decoder would only see mixtures of codes,
    unless theta starts lower or moves faster.
    """

    codebook_size: int = 512
    dim: int = 64
    temperature_start: float = 1.0
    temperature_decay: float = 1e-5
    theta_start: float = FIRST_THETA
    theta_lr: float = 1.0

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        if not SMALLEST_TEMPERATURE <= self.temperature_start < math.inf:
            raise ValueError(
                f"quantizer.temperature_start is {self.temperature_start}; it must be {SMALLEST_TEMPERATURE} or more"
            )
        if not 0 <= self.temperature_decay < math.inf:
            raise ValueError(f"quantizer.temperature_decay is {self.temperature_decay}; it must be 0 or more")
        if not math.isfinite(self.theta_start):
            raise ValueError(f"quantizer.theta_start is {self.theta_start}; it must be a number")
        if not 0 < self.theta_lr < math.inf:
            raise ValueError(f"quantizer.theta_lr is {self.theta_lr}; it must be a number above 0")


@QUANTIZERS.register("sq_vae")
class SQVAE(SoftQuantizer):
    """Training mixes all codes by Gaussian probabilities with Gumbel noise; afterwards the nearest code is used.

    Losses are means over tokens: "kl_discrete" sum_k p_k ln p_k, at least -ln K; "kl_continuous" |z - z_q|^2 / (2 s).
    The official loss of a picture is D_x/2 ln(squared error) + sums over its T tokens. Divided by D_x/2 this is
    ln(mse) + 2 T/D_x (means over tokens), so the default weights are 2 T/D_x, for train.loss_weights
    {l1: 0, log_mse: 1}.
    """

    Config = SQVAEConfig
    default_loss_weights = {"kl_discrete": 2.0, "kl_continuous": 2.0}
    per_token_losses = ("kl_discrete", "kl_continuous")

    def __init__(self, config: SQVAEConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        self.theta = nn.Parameter(torch.tensor(float(config.theta_start)))

    def lr_scales(self) -> dict[str, float]:
        return {"theta": self.config.theta_lr}

    @property
    def variance(self) -> Tensor:
        return 1 + self.theta.exp()

    def _temperature(self, step: Tensor) -> Tensor:
        """Differs: the official max(..., 0) divides by 0 after 10 million steps; ours stops at 1e-3."""
        return decaying_temperature(step, self.config.temperature_start, self.config.temperature_decay)

    def _logits(self, z: Tensor, codes: Tensor) -> Tensor:
        """-|z - e|^2 / (2 s), without the term that is the same for all codes."""
        center = codes.detach().mean(dim=0)  # keeps precision, as in nearest_codeword
        z, codes = z - center, codes - center
        return torch.addmm(-codes.square().sum(dim=1) / 2, z, codes.T) / self.variance

    def _encode(self, z: Tensor) -> Tensor:
        return nearest_codeword(z, self.codes)

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        mixed = in_chunks(lambda part: self._mix(part, temperature), z, self.codebook_size)
        z_q, num_tokens = torch.cat(mixed[0]), max(1, len(z))
        losses = {
            "kl_discrete": sum(mixed[1]) / num_tokens,
            "kl_continuous": (z - z_q).square().sum() / (2 * self.variance) / num_tokens,
        }
        shares = mean_over_all_rows(sum(mixed[2]).detach(), len(z))
        return QuantizerOutput(z_q, losses=losses, metrics=self._metrics(temperature, shares))

    def _mix(self, z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For one chunk: z_q [n, d], and the sums over n of sum_k p_k ln p_k and of p [K]."""
        logits = self._logits(z, self.embedding)
        p = logits.softmax(dim=1)
        return gumbel_softmax(logits, temperature) @ self.embedding, -entropy(p).sum(), p.sum(dim=0)
