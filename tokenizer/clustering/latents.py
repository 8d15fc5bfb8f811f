"""The latents of a corpus, from which a codebook is made: one tensor in memory, or batches on the nodes of a cluster.

Legend: N latents of D channels in total; a batch has n of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class LatentBatch:
    """latents [n, D] float32; weights [n] of their squared errors, or None if all are 1."""

    latents: Tensor
    weights: Tensor | None = None

    def to(self, device: str | torch.device) -> "LatentBatch":
        return LatentBatch(self.latents.to(device), None if self.weights is None else self.weights.to(device))


class Latents(Protocol):
    """All latents of a corpus, in batches of a fixed order. Results do not depend on where the batches are stored."""

    def __len__(self) -> int:
        """N."""
        ...

    def sample(self, count: int, seed: int) -> LatentBatch:
        """count latents, drawn uniformly without replacement; fewer if fewer are available.

        An implementation that keeps only one sample returns the start of it for every seed.
        """
        ...

    def total(self, function: Callable[[LatentBatch], T]) -> T:
        """The sum of function(batch) over all batches, in their order. The function must be picklable."""
        ...

    def mapped(self, function: Callable[[LatentBatch], LatentBatch]) -> "Latents":
        """The same batches with function applied to each. It must keep the number of latents."""
        ...


class InMemory:
    """One batch: latents [N, D] float32 on any device."""

    def __init__(self, latents: Tensor, weights: Tensor | None = None):
        self.batch = LatentBatch(latents, weights)

    def __len__(self) -> int:
        return len(self.batch.latents)

    def sample(self, count: int, seed: int) -> LatentBatch:
        if count >= len(self):
            return self.batch
        # random and not every n-th: latents are in row order of the pictures, so a stride would hit only some columns
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        rows = rows.to(self.batch.latents.device)
        weights = self.batch.weights
        return LatentBatch(self.batch.latents[rows], None if weights is None else weights[rows])

    def total(self, function: Callable[[LatentBatch], T]) -> T:
        return function(self.batch)

    def mapped(self, function: Callable[[LatentBatch], LatentBatch]) -> "InMemory":
        batch = function(self.batch)
        return type(self)(batch.latents, batch.weights)


def as_latents(latents: "Tensor | Latents") -> Latents:
    return InMemory(latents) if isinstance(latents, Tensor) else latents
