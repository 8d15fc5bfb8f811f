"""The latents that a codebook is made from, in parts: one tensor, or blocks on the nodes of a cluster.

Legend: N latents of D channels in all; a part has n of them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Part:
    """latents [n, D] float32; weights [n] of their squared errors, None where each counts 1."""

    latents: Tensor
    weights: Tensor | None = None

    def to(self, device: str | torch.device) -> "Part":
        return Part(self.latents.to(device), None if self.weights is None else self.weights.to(device))


class Latents(Protocol):
    """Parts in an order of their own. What is totalled over them does not depend on who holds them."""

    def __len__(self) -> int:
        """N."""
        ...

    def sample(self, count: int, seed: int) -> Part:
        """So many of them, drawn uniformly without replacement; fewer where there are fewer, or no more at hand.

        seed: which ones. Who has only one sample at hand gives of that whatever the seed.
        """
        ...

    def total(self, function: Callable[[Part], T]) -> T:
        """function of every part, added up in the order of the parts. A function must be picklable."""
        ...

    def mapped(self, function: Callable[[Part], Part]) -> "Latents":
        """The same parts, each as the function gives it, with as many latents as before."""
        ...


class InMemory:
    """One part: latents [N, D] float32 on any device."""

    def __init__(self, latents: Tensor, weights: Tensor | None = None):
        self.part = Part(latents, weights)

    def __len__(self) -> int:
        return len(self.part.latents)

    def sample(self, count: int, seed: int) -> Part:
        if count >= len(self):
            return self.part
        # drawn, not every n-th: latents come row by row of a picture, and a stride would see some of its columns only
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return chosen(self.part, drawn.to(self.part.latents.device))

    def total(self, function: Callable[[Part], T]) -> T:
        return function(self.part)

    def mapped(self, function: Callable[[Part], Part]) -> "InMemory":
        part = function(self.part)
        return type(self)(part.latents, part.weights)


def as_latents(latents: "Tensor | Latents") -> Latents:
    return InMemory(latents) if isinstance(latents, Tensor) else latents


def chosen(part: Part, which: Tensor) -> Part:
    """The latents at these positions, or of this mask."""
    return Part(part.latents[which], None if part.weights is None else part.weights[which])


def weighted(latents: Latents, weigh: Callable[[Tensor], Tensor]) -> Latents:
    """With weights by a function [n, D] -> [n]."""
    return latents.mapped(functools.partial(_weigh, weigh=weigh))


def _weigh(part: Part, weigh: Callable[[Tensor], Tensor]) -> Part:
    return replace(part, weights=weigh(part.latents))
