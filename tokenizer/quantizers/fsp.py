"""FSP: finite scalar perturbation, arXiv 2602.17133, section 3.3. The closed-form sister of VP-VAE.

Differs: the paper mixes perturbed and quantized per forward pass; mixing "element" does it per scalar, as the
official code does, and "vector" per latent with whole-vector acceptance (eq. 17).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.quantizers.base.levels import MixedRadix, check_levels, levels_for
from tokenizer.quantizers.base.norm_loss import moment_losses
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput
from tokenizer.quantizers.base.straight_through import straight_through

UNIT_STD = math.sqrt(12.0)  # one over the standard deviation of U(0, 1)
SMALLEST_P = 2.0**-23  # as in the official code: the inverse of 0 or 1, where an activation saturates, is infinite
MIXING = ("element", "vector")


@dataclass(frozen=True)
class Activation:
    """A distribution function and its inverse, and the variance of the latents that it makes uniform (None: none)."""

    cdf: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    variance: float | None


def _tanh_cdf(a: Tensor) -> Tensor:
    return (torch.tanh(a) + 1) / 2


def _tanh_inverse(p: Tensor) -> Tensor:
    return torch.logit(p) / 2


def _cauchy_cdf(a: Tensor) -> Tensor:
    return torch.atan(a) / math.pi + 0.5


def _cauchy_inverse(p: Tensor) -> Tensor:
    return torch.tan(math.pi * (p - 0.5))


def _laplace_cdf(a: Tensor) -> Tensor:
    tail = 0.5 * torch.exp(-a.abs())
    return torch.where(a < 0, tail, 1 - tail)


def _laplace_inverse(p: Tensor) -> Tensor:
    return torch.where(p < 0.5, torch.log(2 * p), -torch.log(2 * (1 - p)))


ACTIVATIONS = {  # named functions, not lambdas: Ray pickles the module
    "tanh": Activation(_tanh_cdf, _tanh_inverse, math.pi**2 / 12),  # logistic of scale 1/2
    "sigmoid": Activation(torch.sigmoid, torch.logit, math.pi**2 / 3),
    "normal": Activation(torch.special.ndtr, torch.special.ndtri, 1.0),
    "laplace": Activation(_laplace_cdf, _laplace_inverse, 2.0),
    "cauchy": Activation(_cauchy_cdf, _cauchy_inverse, None),
}


@dataclass
class FSPConfig:
    """levels [] takes those of codebook_size. quantize_rate: share that is rounded in training, not perturbed: 0.5 in
    the paper; 0, the official code's default, was better in every pair of results/e3.

    eta scales the perturbation; 1 is one quantization cell. inverse_activation: the decoder sees the inverse of the
    activation, straight-through to the latent, and not p at unit variance (the official need_inv_act).
    """

    codebook_size: int = 1024
    levels: list[int] = field(default_factory=list)
    activation: str = "tanh"
    mixing: str = "element"
    quantize_rate: float = 0.0
    eta: float = 1.0
    inverse_activation: bool = False

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"quantizer.activation is {self.activation!r}; choose one of: {', '.join(ACTIVATIONS)}")
        if self.mixing not in MIXING:
            raise ValueError(f"quantizer.mixing is {self.mixing!r}; choose one of: {', '.join(MIXING)}")
        if not 0 <= self.quantize_rate <= 1:
            raise ValueError(f"quantizer.quantize_rate is {self.quantize_rate}; it must lie in 0..1")


@QUANTIZERS.register("fsp")
class FSP(Quantizer):
    """p = cdf(a) in (0, 1)^d, cut into L equal cells per dim; training sees p moved within one cell's width."""

    levels: Tensor
    Config = FSPConfig
    default_loss_weights = {"norm_mean": 0.1, "norm_var": 0.07}

    def __init__(self, config: FSPConfig):
        super().__init__()
        self.config = config
        levels = list(config.levels) or levels_for(config.codebook_size)
        self.radix = MixedRadix(levels)
        self.dim = self.in_dim = len(levels)
        self.codebook_size = math.prod(levels)
        self.index_levels = tuple(levels)
        self.activation = ACTIVATIONS[config.activation]
        self.vector_wise, self.quantize_rate, self.eta = config.mixing == "vector", config.quantize_rate, config.eta
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)

    @property
    def target_size(self) -> int:
        return self.codebook_size if self.config.levels else self.config.codebook_size

    def _train_forward(self, a: Tensor) -> QuantizerOutput:
        p = self.activation.cdf(a)
        perturbed, accepted = self._perturb(p)
        choose = torch.rand_like(p[:, :1] if self.vector_wise else p) < self.quantize_rate
        p_out = torch.where(choose, straight_through(p, self._centroid(self._digits(p))), perturbed)
        accepted_share = accepted.float().mean() if len(a) else p.new_zeros(())
        shown = self._shown(p_out)
        return QuantizerOutput(
            straight_through(a, shown) if self.config.inverse_activation else shown,
            losses=moment_losses(a, self.activation.variance),
            metrics={"accepted": accepted_share},
        )

    def _perturb(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """p + U(-eta/2L, eta/2L) where that stays inside (0, 1), else p. Returns it and what was accepted."""
        noise = (torch.rand_like(p) - 0.5) * self.eta / self.levels
        moved = p + noise
        inside = (moved > 0) & (moved < 1)
        if self.vector_wise:  # eq. 17
            inside = inside.all(dim=1, keepdim=True)
        return torch.where(inside, moved, p), inside

    @torch.no_grad()
    def perturbation_ratio(self, latents: Tensor) -> float | None:
        """Both measured on what the decoder sees; on p, U(-eta/2L, eta/2L) and rounding are alike in law if eta is 1.
        The share of scalars that training rounds has the error of the codes itself."""
        if len(latents) == 0:
            return None
        p = self.activation.cdf(latents.float())
        with torch.random.fork_rng(devices=[p.device] if p.is_cuda else []):
            torch.manual_seed(0)
            moved, _ = self._perturb(p)
        before, rounded = self._shown(p), self._shown(self._centroid(self._digits(p)))
        energy, error = ((after - before).square().sum() for after in (self._shown(moved), rounded))
        return self.quantize_rate + (1 - self.quantize_rate) * float(energy / error) if error > 0 else None

    def _encode(self, a: Tensor) -> Tensor:
        return self.radix.pack(self._digits(self.activation.cdf(a)))

    def _decode(self, indices: Tensor) -> Tensor:
        return self._shown(self._centroid(self.radix.unpack(indices)))

    def _digits(self, p: Tensor) -> Tensor:
        cell = torch.floor(self.levels * p).nan_to_num(0.0)
        return torch.minimum(cell.clamp(min=0), self.levels - 1).long()

    def _centroid(self, digits: Tensor) -> Tensor:
        return (digits + 0.5) / self.levels

    def _shown(self, p: Tensor) -> Tensor:
        """What the decoder sees of p in (0, 1): its inverse, or p with the mean 0 and the variance 1 of uniform p."""
        if self.config.inverse_activation:
            return self.activation.inverse(p.clamp(SMALLEST_P, 1 - SMALLEST_P))
        return (p - 0.5) * UNIT_STD
