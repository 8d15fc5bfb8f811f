"""Seeded k-means, by partial sums: one machine and a cluster run the same mathematics.

Legend: points [N, D], centroids [K, D].
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenizer.clustering.latents import InMemory, Latents, Part, as_latents
from tokenizer.clustering.neighbors import nearest_codeword

SEEDING_PER_CLUSTER = 32  # points that k-means|| reads
FEW_PER_CLUSTER = (64, 256)  # points of the samples on which centroids settle before they meet all points ...
FEW_TOLERANCE = 1e-3  # ... as far as that; benchmarks/kmeans.py is what these were chosen by
DRAWN_ONE_BY_ONE = 64  # clusters, up to which k-means++ alone is as fast
NOT_FINITE = "k-means got latents that are NaN or infinite; did the training diverge?"
ROUNDS, SHARE = 4, 0.5  # of k-means||: each round draws SHARE * K candidates


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
    """Centroids [K, D] float32, and the mean squared error per point (summed over D) after each iteration over all."""

    centroids: Tensor
    mse: list[float]


def kmeans(
    points: Tensor | Latents,
    num_clusters: int,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> KMeansResult:
    """Lloyd from k-means|| until an iteration lowers the error by less than `tolerance` of itself.

    points: N >= 1, whose weights, if any, are above 0. Of many, a sample settles first. start: the first centroids, at
    most num_clusters of them. With fewer points than clusters some clusters are copies, moved apart a little.
    """
    points = as_latents(points)
    if len(points) == 0:
        raise ValueError("k-means needs at least one point; the corpus gave no latents")
    generator = torch.Generator().manual_seed(seed)
    few = points.sample(FEW_PER_CLUSTER[0] * num_clusters, seed)
    if not few.latents.isfinite().all():
        raise ValueError(NOT_FINITE)
    centroids = first_centroids(few, num_clusters, generator, start)
    for per_cluster in FEW_PER_CLUSTER:
        few = points.sample(per_cluster * num_clusters, seed)
        if len(few.latents) < len(points):
            settled = InMemory(few.latents, few.weights)
            centroids = lloyd(settled, centroids, generator, max_iterations, FEW_TOLERANCE).centroids
    return lloyd(points, centroids, generator, max_iterations, tolerance)


def lloyd(
    points: Latents, centroids: Tensor, generator: torch.Generator, max_iterations: int, tolerance: float
) -> KMeansResult:
    """Assigns and averages in turn. The last error is that of the centroids returned."""
    mse: list[float] = []
    for _ in range(max_iterations):
        total = points.total(partial(partial_sums, centroids=centroids))
        mse.append(total.squared_error / float(total.mass.sum()))
        if not math.isfinite(mse[-1]):
            raise ValueError(NOT_FINITE)
        settled = len(mse) > 1 and mse[-2] - mse[-1] <= tolerance * mse[-2]
        if settled or len(mse) == max_iterations:
            break
        centroids = new_centroids(centroids, total, generator)
    return KMeansResult(centroids, mse)


def partial_sums(part: Part, centroids: Tensor) -> PartialSums:
    """Assigns points to their nearest centroid and sums them up. On the CPU: on a GPU the order of a sum is chance."""
    points, centroids = part.latents.float(), centroids.to(part.latents.device)
    indices = nearest_codeword(points, centroids)
    distances = centroids.index_select(0, indices).sub_(points).square_().sum(dim=1).cpu()
    points, indices = points.cpu(), indices.cpu()
    weights = None if part.weights is None else part.weights.double().cpu()

    def total(values: Tensor) -> Tensor:
        values = values.double() if weights is None else values * weights
        return torch.bincount(indices, weights=values, minlength=len(centroids))

    counts = torch.bincount(indices, minlength=len(centroids))
    mass = counts.double() if weights is None else torch.bincount(indices, weights=weights, minlength=len(centroids))
    sums = torch.stack([total(column) for column in points.T], dim=1)
    return PartialSums(counts, mass, sums, total(distances))


def new_centroids(centroids: Tensor, total: PartialSums, generator: torch.Generator) -> Tensor:
    """Means of the clusters; each empty cluster takes half of one that errs most."""
    means = (total.sums / total.mass.where(total.counts > 0, 1.0)[:, None]).float()
    empty = (total.counts == 0).nonzero().flatten()
    means[empty] = centroids[empty].cpu()
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


def first_centroids(part: Part, num_clusters: int, generator: torch.Generator, start: Tensor | None = None) -> Tensor:
    """k-means|| (Bahmani et al. 2012): candidates drawn many at a time, of which k-means++ chooses by their share.

    start: centroids to keep and add to. Differs: candidates are drawn without replacement, from a sample of the points.
    """
    points, weights = part.latents.float(), _weights(part)
    drawn = torch.randperm(len(points), generator=generator)[: SEEDING_PER_CLUSTER * num_clusters].to(points.device)
    points, weights = points[drawn], weights[drawn]
    known = points[:1] if start is None else start.to(points)
    if num_clusters > DRAWN_ONE_BY_ONE and len(points) > num_clusters:
        candidates = known
        for _ in range(ROUNDS):
            candidates = torch.cat([candidates, _draw(points, weights, candidates, num_clusters, generator)])
        nearest = nearest_codeword(points, candidates).cpu()
        shares = torch.bincount(nearest, weights=weights.cpu(), minlength=len(candidates)).to(points.device)
        points, weights = candidates, shares
    return plus_plus(points, weights, num_clusters, generator, start)


def _draw(points: Tensor, weights: Tensor, known: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Points by their weighted squared distance to the nearest that is known, none twice."""
    mass = (points - known[nearest_codeword(points, known)]).square().sum(dim=1).double() * weights
    # the first to come of exponential clocks: each comes first with a probability that is its share of the mass
    when = torch.empty(len(points), dtype=torch.float64).exponential_(generator=generator).to(points.device) / mass
    count = min(round(SHARE * num_clusters), int((mass > 0).sum()))
    return points[when.topk(count, largest=False).indices]


def plus_plus(
    points: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator, start: Tensor | None = None
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each drawn by its weighted squared distance to those before it.

    points [N, D], weights [N] float64, start: those to begin with -> [num_clusters, D].
    """
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    if start is None:
        start = points[_where(weights.cumsum(dim=0), draws.pop(0))][None]
    start = start.to(points)
    distance = (points - start[nearest_codeword(points, start)]).square().sum(dim=1)
    found = []
    for draw in draws[: num_clusters - len(start)]:
        mass = (distance.double() * weights).cumsum(dim=0)
        if float(mass[-1]) == 0.0:  # every distinct point is a centroid already
            break
        found.append(_where(mass, draw))
        distance = torch.minimum(distance, (points - points[found[-1]]).square().sum(dim=1))
    centroids = torch.cat([start, points[found]])
    copies = num_clusters - len(centroids)
    if copies == 0:
        return centroids
    extra = centroids[torch.arange(copies, device=points.device) % len(centroids)]
    return torch.cat([centroids, extra + _small_offsets(points, copies, generator)])


def _where(mass: Tensor, draw: float) -> int:
    """The position at which a cumulated mass passes this share of the whole."""
    # side right: a point of no mass, such as a centroid, can never be drawn
    return min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), len(mass) - 1)


def _weights(part: Part) -> Tensor:
    """[n] float64."""
    return torch.ones_like(part.latents[:, 0], dtype=torch.float64) if part.weights is None else part.weights.double()


def _small_offsets(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random directions, of a length that is enough to part two equal centroids."""
    return torch.randn(count, points.shape[1], generator=generator).to(points) * _step(points)


def _step(points: Tensor) -> Tensor:
    """A thousandth of the points' spread."""
    return 1e-3 * (points - points.mean(dim=0)).square().mean().sqrt()
