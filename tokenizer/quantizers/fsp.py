"""FSP: finite scalar perturbation, arXiv 2602.17133, section 3.3. A variant of VP-VAE with codes in closed form.

Differs: the paper chooses between perturbation and quantization per forward pass. Mixing "element" chooses per scalar,
as the official code does; "vector" chooses per latent and accepts or rejects whole vectors (eq. 17).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.quantizers.base.levels import MixedRadix, check_levels, levels_for
from tokenizer.quantizers.base.norm_loss import latent_norm_losses
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput
from tokenizer.quantizers.base.straight_through import straight_through

UNIT_STD = math.sqrt(12.0)  # 1 / standard deviation of U(0, 1)
SMALLEST_P = 2.0**-23  # as in the official code: a saturated activation gives 0 or 1, whose inverse is infinite
MIXING = ("element", "vector")


@dataclass(frozen=True)
class Activation:
    """A distribution function, its inverse, and the variance of its distribution (None if there is none)."""

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


ACTIVATIONS = {  # named functions instead of lambdas, because Ray pickles the module
    "tanh": Activation(_tanh_cdf, _tanh_inverse, math.pi**2 / 12),  # logistic distribution of scale 1/2
    "sigmoid": Activation(torch.sigmoid, torch.logit, math.pi**2 / 3),
    "normal": Activation(torch.special.ndtr, torch.special.ndtri, 1.0),
    "laplace": Activation(_laplace_cdf, _laplace_inverse, 2.0),
    "cauchy": Activation(_cauchy_cdf, _cauchy_inverse, None),
}


@dataclass
class FSPConfig:
    """levels: [] derives them from codebook_size. quantize_rate: share of values that training rounds instead of
    perturbing. The paper has 0.5; 0, the official code's default, was better in every pair of results/e3.

    eta: scale of the perturbation; 1 is one quantization cell. inverse_activation: the decoder gets the inverse of the
    activation, with a straight-through gradient to the latent, instead of p at unit variance (official: need_inv_act).
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
    """p = cdf(a) in (0, 1)^d, split into L equal cells per dim. Training moves p by up to half a cell width."""

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
        decoded = self._to_decoder(p_out)
        return QuantizerOutput(
            straight_through(a, decoded) if self.config.inverse_activation else decoded,
            losses=latent_norm_losses(a, self.activation.variance),
            metrics={"accepted": accepted_share},
        )

    def _perturb(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """p + U(-eta/2L, eta/2L) if it stays inside (0, 1), otherwise p. Also returns which values were accepted."""
        noise = (torch.rand_like(p) - 0.5) * self.eta / self.levels
        moved = p + noise
        inside = (moved > 0) & (moved < 1)
        if self.vector_wise:  # eq. 17
            inside = inside.all(dim=1, keepdim=True)
        return torch.where(inside, moved, p), inside

    @torch.no_grad()
    def perturbation_ratio(self, latents: Tensor) -> float | None:
        """Both energies are measured on the decoder's input. Scalars that training rounds count with a ratio of 1."""
        if len(latents) == 0:
            return None
        p = self.activation.cdf(latents.float())
        with torch.random.fork_rng(devices=[p.device] if p.is_cuda else []):
            torch.manual_seed(0)
            moved, _ = self._perturb(p)
        before, rounded = self._to_decoder(p), self._to_decoder(self._centroid(self._digits(p)))
        energy, error = ((after - before).square().sum() for after in (self._to_decoder(moved), rounded))
        return self.quantize_rate + (1 - self.quantize_rate) * float(energy / error) if error > 0 else None

    def _encode(self, a: Tensor) -> Tensor:
        return self.radix.pack(self._digits(self.activation.cdf(a)))

    def _decode(self, indices: Tensor) -> Tensor:
        return self._to_decoder(self._centroid(self.radix.unpack(indices)))

    def _digits(self, p: Tensor) -> Tensor:
        cell = torch.floor(self.levels * p).nan_to_num(0.0)
        return torch.minimum(cell.clamp(min=0), self.levels - 1).long()

    def _centroid(self, digits: Tensor) -> Tensor:
        return (digits + 0.5) / self.levels

    def _to_decoder(self, p: Tensor) -> Tensor:
        """The decoder's input for p in (0, 1): the inverse activation, or p scaled to mean 0 and variance 1."""
        if self.config.inverse_activation:
            return self.activation.inverse(p.clamp(SMALLEST_P, 1 - SMALLEST_P))
        return (p - 0.5) * UNIT_STD
