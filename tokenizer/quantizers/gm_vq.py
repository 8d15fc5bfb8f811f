"""GM-VQ: Gaussian mixture vector quantization with the aggregated categorical posterior, arXiv 2410.10180.

We found no official code, and some of the paper's equations are incomplete. What we filled in is marked "Differs".

Legend: z_hat [N, L] latents, w [N, L] weights of their dimensions, M [K, L] codes mu_c, eps standard normal noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tokenizer.quantizers.base.codebook import check_codebook_shape, first_codes
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.base.stochastic import (
    SoftQuantizer,
    check_annealing,
    entropy,
    expected_distance,
    exponential_temperature,
    gaussian_logits,
    gumbel_softmax,
    in_chunks,
    mean_over_all_rows,
)

SMALLEST_VARIANCE = 1e-8  # added under the square root, which has an infinite gradient where a latent equals a code


@dataclass
class GMVQConfig:
    """variance: sigma^2 of the generative model, which the paper does not state. At 1/2 the noise variance per
    dimension is the mean squared distance of the latent to its code. anneal_steps: from temperature_start to
    temperature_end. beta: weight of the KL term, in the paper's units (eq. 14); above 1 for GM-VQ + Entropy.
    """

    codebook_size: int = 1024
    dim: int = 64
    temperature_start: float = 2.0
    temperature_end: float = 0.1
    anneal_steps: int = 10_000
    variance: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        check_annealing(self.temperature_start, self.temperature_end, self.anneal_steps)
        if not 0 < self.variance < math.inf:
            raise ValueError(f"quantizer.variance is {self.variance}; it must be a number above 0")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"quantizer.beta is {self.beta}; it must be a number of 0 or more")


@QUANTIZERS.register("gm_vq")
class GMVQ(SoftQuantizer):
    """Latents [..., 2 dim]: the first half is z_hat and softplus of the second half is w; the index depends on both.

    Training mixes all codes and adds noise with the scale of z_hat's distance to them, so every code has a gradient.

    Losses: "latent" is E |z - mu_c|^2 per dimension; at variance 1/2 it is VQ-VAE's commitment weighted by q(c|x). The
    paper does not state its gamma; configs/quantizers/gm_vq.yaml lists the values that we tried.
    "prior" is KL(mean q(c|x) || uniform). The paper sums it over the T tokens of a picture, and the squared error over
    the D_x values (eq. 13 and 14). Ours are means over both, so the default weight is beta T / D_x (1/48 at factor 4),
    for train.loss_weights {l1: 0, mse: 1}. A configured weight replaces all of this, including beta.
    """

    Config = GMVQConfig
    default_loss_weights = {"latent": 1e-2, "prior": 1.0}
    per_token_losses = ("prior",)

    def __init__(self, config: GMVQConfig):
        super().__init__(config.codebook_size, config.dim)
        self.default_loss_weights = {**type(self).default_loss_weights, "prior": config.beta}  # type: ignore[misc]
        self.in_dim = 2 * config.dim
        self.config = config

    def _initialise(self, z: Tensor) -> None:
        self.embedding.data.copy_(first_codes(z[:, : self.dim], self.codebook_size))

    def _temperature(self, step: Tensor) -> Tensor:
        config = self.config
        return exponential_temperature(step, config.temperature_start, config.temperature_end, config.anneal_steps)

    def _logits(self, z: Tensor, codes: Tensor) -> Tensor:
        """Eq. 15 to 17. Differs: w per dimension and the factor 1/2 are our reading of the text."""
        z_hat, raw = z.split(self.dim, dim=1)
        return gaussian_logits(z_hat, codes, softplus(raw))

    @torch.no_grad()
    def code_shares(self, z: Tensor) -> Tensor:
        """Mean of q(c|x) over the batch, without noise: [..., 2 dim] -> [K] float32.

        The paper computes perplexity from it.
        """
        with torch.autocast(z.device.type, enabled=False):
            flat, codes = self._flatten(z), self.codes
            sums = [self._logits(part, codes).softmax(dim=1).sum(dim=0) for part in self._split(flat)]
        return torch.stack(sums).sum(dim=0) / max(1, len(flat))

    def _soft_forward(self, z: Tensor, temperature: Tensor) -> QuantizerOutput:
        mixed = in_chunks(lambda part: self._mix(part, temperature), z, self.codebook_size)
        mean, variance = torch.cat(mixed[0]), torch.cat(mixed[1])
        z_q = mean + (variance + SMALLEST_VARIANCE).sqrt()[:, None] * torch.randn_like(mean)
        shares = mean_over_all_rows(sum(mixed[3]), len(z))
        losses = {
            "latent": sum(mixed[2]) / max(1, len(z)),
            "prior": math.log(self.codebook_size) - entropy(shares),  # eq. 12 and 14
        }
        return QuantizerOutput(z_q, losses=losses, metrics=self._metrics(temperature, shares))

    def _mix(self, z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For one chunk: mean [n, L] and variance [n] of z given x, sums over n of E_q |z - mu_c|^2 / L and of q [K].

        Eq. 18: sigma_c^2(x) = |z_hat - mu_c|^2 / (2 sigma^2 L), which is also E |z - mu_c|^2 per dimension.
        Differs: a soft choice y has variance sum_c y_c sigma_c^2, which equals eq. 18 for one-hot y.
        """
        logits = self._logits(z, self.embedding)
        q, y = logits.softmax(dim=1), gumbel_softmax(logits, temperature)
        z_hat, unit = z[:, : self.dim], 2 * self.config.variance * self.dim
        variance = expected_distance(z_hat, y, self.embedding) / unit
        latent = expected_distance(z_hat, q, self.embedding).sum() / unit
        return y @ self.embedding, variance, latent, q.sum(dim=0)
