"""TokenBridge, arXiv 2503.16430: trains a KL autoencoder without codes, then splits each dimension into bins.

Legend: z [N, 2 d] the posterior: first the means, then the log-variances.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenizer.clustering.latents import LatentBatch, Latents
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.levels import MixedRadix
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput

CLIP = 3.0  # standard deviations, at which latents are clipped and the outermost bins end
MAX_BINS = 512  # with more than 740 the outermost bin would be beyond CLIP
MAX_CODES = 2**31  # so that an index fits int32 in every token format
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # as in latent diffusion's autoencoder
SMALLEST_STD = 1e-6  # for dimensions in which all latents are equal


@dataclass
class TokenBridgeConfig:
    """dim: 0 derives it, so that bins**dim, the number of codes, is about codebook_size.

    The official code has 64 bins in 16 dimensions; the baseline of arXiv 2602.17133 has 4 bins in 4 to 7.
    """

    codebook_size: int = 1024
    bins: int = 4
    dim: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= MAX_BINS:
            raise ValueError(f"quantizer.bins is {self.bins}; it must lie in 2..{MAX_BINS}")
        if self.codebook_size < 2 or self.dim < 0:
            raise ValueError(
                f"quantizer.codebook_size is {self.codebook_size} and dim {self.dim}; "
                "the first must be 2 or more, the second 0 (derived from codebook_size) or more"
            )
        if self.num_codes > MAX_CODES:
            raise ValueError(
                f"quantizer.bins={self.bins} in {self.num_dims} dims gives {self.num_codes:.3g} codes; "
                f"at most {MAX_CODES} are possible: lower bins, dim or codebook_size"
            )

    @property
    def num_dims(self) -> int:
        return self.dim or max(1, round(math.log(self.codebook_size) / math.log(self.bins)))

    @property
    def num_codes(self) -> int:
        return self.bins**self.num_dims


@QUANTIZERS.register("token_bridge")
class TokenBridge(Quantizer):
    """Trains on samples of the posterior, with "kl" to N(0, 1). `fit` measures mean and variance of the posterior
    means, on which a grid for normal latents is placed.

    Differs: the posterior means are standardised per dimension with these measurements; the official code has one fixed
    scale (.2325, then 3/5), which assumes one particular pretrained VAE. The default weight of "kl" is ours and small:
    tune it. The baseline of arXiv 2602.17133 has 11.5 dB at every size, as if its posterior had collapsed; the metric
    `posterior_std` shows this during training (1 is collapsed).
    """

    values: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    fitted: Tensor
    Config = TokenBridgeConfig
    default_loss_weights = {"kl": 1e-4}

    def __init__(self, config: TokenBridgeConfig):
        super().__init__()
        self.config = config
        self.dim, self.codebook_size = config.num_dims, config.num_codes
        self.in_dim = 2 * self.dim
        self.index_levels = (config.bins,) * self.dim
        self.radix = MixedRadix(list(self.index_levels))
        self.register_buffer("values", bin_values(config.bins))
        self.register_buffer("latent_mean", torch.zeros(self.dim))
        self.register_buffer("latent_std", torch.ones(self.dim))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def target_size(self) -> int:
        return self.config.codebook_size

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        mean, log_variance = z.split(self.dim, dim=1)
        log_variance = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        std = (log_variance / 2).exp()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        count = max(1, mean.numel())
        return QuantizerOutput(
            mean + std * torch.randn_like(mean),
            losses={"kl": kl.sum() / count},
            metrics={"posterior_std": std.detach().sum() / count},
        )

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        if not self.fitted:  # before fit the decoder gets the mean itself
            return QuantizerOutput(z[:, : self.dim])
        return super()._eval_forward(z)

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        """Measures the posterior means; latents [N, 2 d] with N >= 1. codebook_size can only be bins**dim."""
        super()._fit(latents, codebook_size, seed)
        if len(latents) == 0:
            raise ValueError("token_bridge needs at least one latent for fit, but the corpus gave none")
        mean = latents.total(partial(_power_sum, center=torch.zeros(self.dim), power=1)) / len(latents)
        variance = latents.total(partial(_power_sum, center=mean, power=2)) / len(latents)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(variance.sqrt().clamp(min=SMALLEST_STD))
        self.fitted.fill_(True)
        return []

    def _encode(self, z: Tensor) -> Tensor:
        self._check_fitted()
        standard = ((z[:, : self.dim] - self.latent_mean) / self.latent_std).clamp(-CLIP, CLIP)
        # the nearest value, not the bin that contains it: as in the official code, and with the smaller error
        return self.radix.pack(torch.bucketize(standard.contiguous(), (self.values[1:] + self.values[:-1]) / 2))

    def _decode(self, indices: Tensor) -> Tensor:
        self._check_fitted()
        return self.values[self.radix.unpack(indices)] * self.latent_std + self.latent_mean

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise CodebookMissing(
                "this token_bridge has no codebook yet; run `tokenmill codebook CONFIG.yaml` to make it"
            )


def _power_sum(batch: LatentBatch, center: Tensor, power: int) -> Tensor:
    """Sum over the latents of (mean - center)**power: [d] float64."""
    means = batch.latents[:, : len(center)].double()
    return (means - center.to(means)).pow(power).sum(dim=0).cpu()


def bin_values(bins: int) -> Tensor:
    """Means of N(0, 1) within `bins` equally likely intervals, clipped at +-3: [bins] float32, ascending.

    The mean between a and b is (phi(a) - phi(b)) / (Phi(b) - Phi(a)).
    """
    shares = torch.arange(bins + 1, dtype=torch.float64) / bins
    edges = torch.special.ndtri(shares).clamp(-CLIP, CLIP)
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    values = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
    return ((values - values.flip(0)) / 2).float()  # exactly antisymmetric, as in theory
