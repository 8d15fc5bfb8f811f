"""The Frechet distance between the features of pictures and those of their reconstructions, such as rFID.

A name says what was measured: `rfid-inception-crop256-originals` or `frechet-squeeze-ndf-full-originals` is the net,
what the tokenizer's preprocessing left of the pictures, and the reference: the originals of the very samples that were
reconstructed. Only the weights that the field uses make it `rfid`. Lower is better. The value is too high by an amount
that falls with the number of samples and depends on the model (arXiv 1911.07023): compare equal numbers of samples.
"""

import hashlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.modalities.image.inception import FidInception
from tokenizer.modalities.image.perceptual import SqueezeDistance

# pytorch-fid's file of FID_URL; torch-fidelity's weights-inception-2015-12-05-6726825d.pth has the same bytes
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FID_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
AT_ONCE = 64  # pictures
STEPS = 2.0**18  # in 1, that features are rounded to
SMALLEST_SIDE = 32  # below it SqueezeNet has no position left after its pooling


class FrechetFeatures(nn.Module):
    """A frozen net, always in eval mode; `name` is that of the metric."""

    def __init__(self, extractor: str, weights: str, pictures: str):
        """extractor: of EXTRACTORS. pictures: what preprocessing left of them, in the words of the name.

        Raises ValueError or FileNotFoundError, naming what is wrong and what to do. Nothing is downloaded.
        """
        super().__init__()
        if extractor not in EXTRACTORS:
            raise ValueError(f"frechet is {extractor!r}; choose one of {', '.join(EXTRACTORS)}")
        load, hint = EXTRACTORS[extractor]
        if not Path(weights).is_file():
            raise FileNotFoundError(f"frechet={extractor} needs weights, and frechet_weights is {weights!r}; {hint}")
        try:
            prefix, net = load(weights)
        except (RuntimeError, LookupError, TypeError, AttributeError, EOFError, *UNREADABLE) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise ValueError(f"frechet_weights={weights} holds no weights of {extractor} ({reason}); {hint}") from error
        self.name = f"{prefix}-{pictures}-originals"
        self.net = net.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrechetFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float RGB in [0, 1] -> features [B, D] float32."""
        return torch.cat([self.net(some) for some in x.split(AT_ONCE)])


class SqueezeFeatures(nn.Module):
    """The last of the taps of squeeze-ndf, of unit length at each position, mean over the positions: [B, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = SqueezeDistance()

    def forward(self, x: Tensor) -> Tensor:
        sides = [max(side, SMALLEST_SIDE) for side in x.shape[2:]]
        if sides != list(x.shape[2:]):
            x = F.interpolate(x, sides, mode="bilinear")
        *_, last = self.distance.features(2 * x - 1)
        return last.mean(dim=(2, 3))


def _load_inception(weights: str) -> tuple[str, nn.Module]:
    net = FidInception()
    wanted = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    net.load_state_dict({name: stored[name] for name in wanted}, strict=False)  # it holds a classifier too
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "rfid-inception" if digest == FID_SHA256 else f"frechet-inception-{digest[:8]}", net


def _load_squeeze(weights: str) -> tuple[str, nn.Module]:
    net = SqueezeFeatures()
    net.distance.load_state_dict(load_file(weights))
    return "frechet-squeeze-ndf", net


UNREADABLE = (pickle.UnpicklingError, SafetensorError)
# (path of the weights -> what the metric's name starts with and the net, where the weights come from); a net takes
# pictures [B, 3, H, W] in [0, 1] and gives features [B, D]; only the official FID weights are called rfid
EXTRACTORS: dict[str, tuple[Callable[[str], tuple[str, nn.Module]], str]] = {
    "inception": (_load_inception, f"set it to a copy of {FID_URL}"),
    "squeeze-ndf": (_load_squeeze, "make them with: python scripts/make_squeeze_weights.py OUT.safetensors"),
}


# -- sums that parts of a corpus add up to --------------------------------------------------------------------------


@dataclass
class FeatureSums:
    """Of n features f [D]: the sums of f [D] and of f f^T [D, D], int64, in units of 2^-18 and 2^-36.

    Integers add up exactly, so that no bit of the sums depends on how samples are split or in which order. 8 D^2 bytes:
    34 MB at D=2048. Differs: f is rounded to 2^-18 for this, which adds 1e-12 to a variance.
    """

    n: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> "FeatureSums":
        zeros = torch.zeros(dim, dtype=torch.int64, device=device)
        return cls(0, zeros, torch.zeros(dim, dim, dtype=torch.int64, device=device))

    def add(self, features: Tensor) -> None:
        """features [B, D]. Raises ValueError if one is not finite."""
        for some in features.split(AT_ONCE):  # so few that float64 holds their sums of products exactly, below f = 45
            steps = (some.double() * STEPS).round()
            if not steps.isfinite().all():
                raise ValueError("a feature is NaN or infinite: frechet_weights are broken, or not of this net")
            self._add(len(steps), steps.sum(dim=0).to(torch.int64), (steps.T @ steps).to(torch.int64))

    def merge(self, other: "FeatureSums") -> None:
        self._add(other.n, other.total.to(self.total.device), other.outer.to(self.outer.device))

    def __getstate__(self) -> dict[str, Any]:
        """On the CPU, since the process that adds up the parts may have no GPU."""
        return {"n": self.n, "total": self.total.cpu(), "outer": self.outer.cpu()}

    @torch.inference_mode()
    def _add(self, n: int, total: Tensor, outer: Tensor) -> None:
        self.n += n
        self.total += total
        self.outer += outer
        if self.outer.diagonal().min() < 0:  # sums of squares, so one went past 2^63
            raise OverflowError(f"the features of {self.n} samples are too large: the sum of a square passed 2^27")

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D], float64; NaN below two samples."""
        total = self.total.cpu().numpy().astype(np.float64) / STEPS
        outer = self.outer.cpu().numpy().astype(np.float64) / STEPS**2
        if self.n < 2:
            return np.full_like(total, math.nan), np.full_like(outer, math.nan)
        mean = total / self.n
        return mean, (outer - np.outer(mean, total)) / (self.n - 1)


@dataclass
class FrechetSums:
    """Sums of the features of originals and of their reconstructions."""

    original: FeatureSums
    rebuilt: FeatureSums

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> "FrechetSums":
        return cls(FeatureSums.empty(dim, device), FeatureSums.empty(dim, device))

    def add(self, original: Tensor, rebuilt: Tensor) -> None:
        self.original.add(original)
        self.rebuilt.add(rebuilt)

    def merge(self, other: "FrechetSums") -> None:
        self.original.merge(other.original)
        self.rebuilt.merge(other.rebuilt)

    def numbers(self, name: str) -> dict[str, Any]:
        """The distance under its name, and how many samples of how many features it is of."""
        value = frechet_distance(self.original.gaussian(), self.rebuilt.gaussian())
        return {name: value, f"{name}_samples": self.original.n, f"{name}_features": len(self.original.total)}


def frechet_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of two Gaussians, mean [D] and covariance [D, D] each.

    With C = A A^T, the trace of the root is the sum of the singular values of A1^T A2: real, symmetric in the two, and
    stable where a covariance is singular. Source: arXiv 1706.08500, eq. 6. NaN where a covariance has NaN.
    """
    (m1, c1), (m2, c2) = one, other
    if not (np.isfinite(c1).all() and np.isfinite(c2).all()):
        return math.nan
    a1, a2 = _factor(c1), _factor(c2)
    roots = scipy.linalg.svdvals(a1.T @ a2).sum()
    distance = np.square(m1 - m2).sum() + np.square(a1).sum() + np.square(a2).sum() - 2 * roots
    return max(0.0, float(distance))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A with A A^T = covariance."""
    values, vectors = scipy.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0))  # rounding makes some zeros of a singular one negative


def about(name: str, numbers: dict[str, Any]) -> str:
    """What one must know to read a Frechet distance. numbers: those of `FrechetSums.numbers`, among others."""
    samples, features = numbers[f"{name}_samples"], numbers[f"{name}_features"]
    told = f"{name} is a Frechet distance of {samples:,.0f} samples, lower is better"
    if samples < features:
        told += (
            f"; they are fewer than its {features:,.0f} features, so the covariances are singular "
            "and the value is too high"
        )
    return f"{told}; compare it only with values of as many samples"
