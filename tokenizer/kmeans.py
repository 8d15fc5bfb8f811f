"""Seeded k-means++ and Lloyd, by partial sums: one machine and a cluster run the same mathematics.

Legend: points [N, D], centroids [K, D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.neighbors import nearest_codeword

SEEDING_POINTS_PER_CLUSTER = 32  # k-means++ reads every point once per cluster; a sample seeds as well


@dataclass
class PartialSums:
    """What Lloyd needs of one part of the points; parts add up. float64, so that their order hardly matters."""

    counts: Tensor  # [K] int64: points
    mass: Tensor  # [K] float64: their weights
    sums: Tensor  # [K, D] float64, weighted
    errors: Tensor  # [K] float64: weighted squared distances to the centroid, summed over points and dims

    def __add__(self, other: "PartialSums") -> "PartialSums":
        counts, mass = self.counts + other.counts, self.mass + other.mass
        return PartialSums(counts, mass, self.sums + other.sums, self.errors + other.errors)

    @property
    def squared_error(self) -> float:
        return float(self.errors.sum())


@dataclass
class KMeansResult:
    """Centroids [K, D] float32, and the mean squared error per point (summed over D) after each iteration."""

    centroids: Tensor
    mse: list[float]


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> KMeansResult:
    """Lloyd from k-means++ until an iteration lowers the error by less than `tolerance` of itself.

    points [N, D] float32 with N >= 1, weights [N] above 0 of their squared errors (None: all 1). With fewer points
    than clusters some clusters are copies, moved apart a little.
    """
    if len(points) == 0:
        raise ValueError("k-means needs at least one point; the corpus gave no latents")
    points = points.detach().float()
    if not points.isfinite().all():
        raise ValueError("k-means got latents that are NaN or infinite; did the training diverge?")
    generator = torch.Generator().manual_seed(seed)
    centroids = plus_plus(points, num_clusters, generator, weights)
    mse: list[float] = []
    for _ in range(max_iterations):
        total = partial_sums(points, centroids, weights)
        mse.append(total.squared_error / float(total.mass.sum()))
        if len(mse) > 1 and mse[-2] - mse[-1] <= tolerance * mse[-2]:
            break
        centroids = new_centroids(centroids, total, generator)
    return KMeansResult(centroids, mse)


def partial_sums(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> PartialSums:
    """Assigns points to their nearest centroid and sums them up."""
    indices = nearest_codeword(points, centroids)
    weight = points.new_ones(len(points), dtype=torch.float64) if weights is None else weights.double()

    def total(values: Tensor) -> Tensor:
        return torch.bincount(indices, weights=values, minlength=len(centroids))

    sums = torch.stack([total(column * weight) for column in points.T], dim=1)
    errors = total((points - centroids[indices]).double().square().sum(dim=1) * weight)
    return PartialSums(torch.bincount(indices, minlength=len(centroids)), total(weight), sums, errors)


def new_centroids(centroids: Tensor, total: PartialSums, generator: torch.Generator) -> Tensor:
    """Means of the clusters; each empty cluster takes half of one that errs most."""
    means = (total.sums / total.mass.where(total.counts > 0, 1.0)[:, None]).float()
    empty = (total.counts == 0).nonzero().flatten()
    means[empty] = centroids[empty]
    if len(empty) == 0:
        return means
    largest = total.errors.argsort(descending=True, stable=True)[: len(empty)]
    # a cluster that is no wider than the step which parts it (equal points above all) would only err more
    worth = total.errors[largest] > 4 * total.mass[largest] * means.shape[1] * _step(means) ** 2
    largest = largest[worth & (total.counts[largest] > 1)]
    empty = empty[: len(largest)]
    # the mean itself stays where it is, so that no split can raise the error
    means[empty] = means[largest] + _small_offsets(means, len(empty), generator)
    return means


def plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """First centroids: each drawn with probability proportional to its weighted squared distance to those before it.

    Source: Arthur and Vassilvitskii 2007. Differs: drawn from a sample of the points when they are many.
    """
    limit = SEEDING_POINTS_PER_CLUSTER * num_clusters
    if len(points) > limit:
        drawn = torch.randperm(len(points), generator=generator)[:limit].to(points.device)
        points, weights = points[drawn], None if weights is None else weights[drawn]
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(points))]
    distance = (points - points[chosen[0]]).square().sum(dim=1)
    for draw in draws[1:]:
        mass = (distance.double() if weights is None else distance.double() * weights).cumsum(dim=0)
        if float(mass[-1]) == 0.0:  # every distinct point is a centroid already
            break
        # side right: a point of no mass, such as a centroid, can never be drawn
        chosen.append(min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), len(points) - 1))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
    centroids = points[chosen]
    copies = num_clusters - len(chosen)
    if copies == 0:
        return centroids
    extra = centroids[torch.arange(copies, device=points.device) % len(chosen)]
    return torch.cat([centroids, extra + _small_offsets(points, copies, generator)])


def _small_offsets(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random directions, of a length that is enough to part two equal centroids."""
    return torch.randn(count, points.shape[1], generator=generator).to(points) * _step(points)


def _step(points: Tensor) -> Tensor:
    """A thousandth of the points' spread."""
    return 1e-3 * (points - points.mean(dim=0)).square().mean().sqrt()
