"""Seeded k-means from partial sums: one machine and a cluster run the same computation.

Legend: points [N, D], centroids [K, D].
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenizer.clustering.latents import InMemory, LatentBatch, Latents, as_latents
from tokenizer.clustering.neighbors import nearest_codeword

SEEDING_PER_CLUSTER = 32  # points per cluster for k-means||
# Lloyd first runs on samples of this many points per cluster, to this tolerance; both chosen with benchmarks/kmeans.py
SAMPLE_PER_CLUSTER = (64, 256)
SAMPLE_TOLERANCE = 1e-3
MAX_PLUS_PLUS = 64  # clusters up to which k-means++ alone is as fast as k-means||
NOT_FINITE = "k-means got latents that are NaN or infinite; check whether training diverged"
ROUNDS, SHARE = 4, 0.5  # of k-means||: each round draws SHARE * K candidates


@dataclass
class PartialSums:
    """Sums of one batch for a Lloyd iteration; sums of batches add up.

    In float64, so that their order hardly matters.
    """

    counts: Tensor  # [K] int64: number of points
    mass: Tensor  # [K] float64: sum of their weights
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
    """centroids [K, D] float32. mse: mean squared error per point, summed over D, of each iteration over all points."""

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
    """Lloyd's algorithm, seeded by k-means||, until an iteration lowers the error by less than the fraction
    `tolerance`.

    points: N >= 1, with weights above 0 if any. Many points are first clustered on samples. start: initial centroids,
    at most num_clusters; more are added. If there are fewer points than clusters, the extra centroids are copies with
    small random offsets. Raises ValueError without points, and for NaN or infinite ones.
    """
    points = as_latents(points)
    if len(points) == 0:
        raise ValueError("k-means needs at least one point, but the corpus gave no latents")
    generator = torch.Generator().manual_seed(seed)
    sample = points.sample(SAMPLE_PER_CLUSTER[0] * num_clusters, seed)
    if not sample.latents.isfinite().all():
        raise ValueError(NOT_FINITE)
    centroids = first_centroids(sample, num_clusters, generator, start)
    for per_cluster in SAMPLE_PER_CLUSTER:
        sample = points.sample(per_cluster * num_clusters, seed)
        if len(sample.latents) < len(points):
            in_memory = InMemory(sample.latents, sample.weights)
            centroids = lloyd(in_memory, centroids, generator, max_iterations, SAMPLE_TOLERANCE).centroids
    return lloyd(points, centroids, generator, max_iterations, tolerance)


def lloyd(
    points: Latents, centroids: Tensor, generator: torch.Generator, max_iterations: int, tolerance: float
) -> KMeansResult:
    """Lloyd's algorithm: assign, average, repeat. The last error is that of the returned centroids."""
    mse: list[float] = []
    for _ in range(max_iterations):
        total = points.total(partial(partial_sums, centroids=centroids))
        mse.append(total.squared_error / float(total.mass.sum()))
        if not math.isfinite(mse[-1]):
            raise ValueError(NOT_FINITE)
        converged = len(mse) > 1 and mse[-2] - mse[-1] <= tolerance * mse[-2]
        if converged or len(mse) == max_iterations:
            break
        centroids = new_centroids(centroids, total, generator)
    return KMeansResult(centroids, mse)


def partial_sums(batch: LatentBatch, centroids: Tensor) -> PartialSums:
    """Assigns points to their nearest centroid and sums them up: on the CPU, since GPU sums have no fixed order."""
    points, centroids = batch.latents.float(), centroids.to(batch.latents.device)
    indices = nearest_codeword(points, centroids)
    distances = centroids.index_select(0, indices).sub_(points).square_().sum(dim=1).cpu()
    points, indices = points.cpu(), indices.cpu()
    weights = None if batch.weights is None else batch.weights.double().cpu()

    def total(values: Tensor) -> Tensor:
        values = values.double() if weights is None else values * weights
        return torch.bincount(indices, weights=values, minlength=len(centroids))

    counts = torch.bincount(indices, minlength=len(centroids))
    mass = counts.double() if weights is None else torch.bincount(indices, weights=weights, minlength=len(centroids))
    sums = torch.stack([total(column) for column in points.T], dim=1)
    return PartialSums(counts, mass, sums, total(distances))


def new_centroids(centroids: Tensor, total: PartialSums, generator: torch.Generator) -> Tensor:
    """Means of the clusters. Each empty cluster gets half of one of the clusters with the largest error."""
    means = (total.sums / total.mass.where(total.counts > 0, 1.0)[:, None]).float()
    empty = (total.counts == 0).nonzero().flatten()
    means[empty] = centroids[empty].cpu()
    if len(empty) == 0:
        return means
    largest = total.errors.argsort(descending=True, stable=True)[: len(empty)]
    # splitting a cluster that is narrower than the offset, such as equal points, would only raise the error
    worth_splitting = total.errors[largest] > 4 * total.mass[largest] * means.shape[1] * _step(means) ** 2
    largest = largest[worth_splitting & (total.counts[largest] > 1)]
    empty = empty[: len(largest)]
    # the mean itself stays in place, so a split cannot raise the error
    means[empty] = means[largest] + _small_offsets(means, len(empty), generator)
    return means


def first_centroids(
    batch: LatentBatch, num_clusters: int, generator: torch.Generator, start: Tensor | None = None
) -> Tensor:
    """k-means|| (Bahmani et al. 2012): draws many candidates at a time; k-means++ then picks among them, each weighted
    by the points nearest to it.

    start: centroids to keep; others are added. Differs: candidates are drawn without replacement and from a sample.
    """
    points = batch.latents.float()
    weights = torch.ones_like(points[:, 0]).double() if batch.weights is None else batch.weights.double()
    drawn = torch.randperm(len(points), generator=generator)[: SEEDING_PER_CLUSTER * num_clusters].to(points.device)
    points, weights = points[drawn], weights[drawn]
    known = points[:1] if start is None else start.to(points)
    if num_clusters > MAX_PLUS_PLUS and len(points) > num_clusters:
        candidates = known
        for _ in range(ROUNDS):
            candidates = torch.cat([candidates, _draw(points, weights, candidates, num_clusters, generator)])
        nearest = nearest_codeword(points, candidates).cpu()
        shares = torch.bincount(nearest, weights=weights.cpu(), minlength=len(candidates)).to(points.device)
        points, weights = candidates, shares
    return plus_plus(points, weights, num_clusters, generator, start)


def _draw(points: Tensor, weights: Tensor, known: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draws points, without replacement, by their weighted squared distance to the nearest known centroid."""
    mass = (points - known[nearest_codeword(points, known)]).square().sum(dim=1).double() * weights
    # exponential clocks: each point's clock rings first with a probability equal to its share of the mass
    times = torch.empty(len(points), dtype=torch.float64).exponential_(generator=generator).to(points.device) / mass
    count = min(round(SHARE * num_clusters), int((mass > 0).sum()))
    return points[times.topk(count, largest=False).indices]


def plus_plus(
    points: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator, start: Tensor | None = None
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): draws each centroid by the weighted squared distance to those before
    it.

    points [N, D], weights [N] float64, start: the first centroids -> [num_clusters, D].
    """
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    if start is None:
        start = points[_pick(weights.cumsum(dim=0), draws.pop(0))][None]
    start = start.to(points)
    distance = (points - start[nearest_codeword(points, start)]).square().sum(dim=1)
    picked: list[int] = []
    for draw in draws[: num_clusters - len(start)]:
        mass = (distance.double() * weights).cumsum(dim=0)
        if float(mass[-1]) == 0.0:  # every distinct point is already a centroid
            break
        picked.append(_pick(mass, draw))
        distance = torch.minimum(distance, (points - points[picked[-1]]).square().sum(dim=1))
    centroids = torch.cat([start, points[picked]])
    copies = num_clusters - len(centroids)
    if copies == 0:
        return centroids
    extra = centroids[torch.arange(copies, device=points.device) % len(centroids)]
    return torch.cat([centroids, extra + _small_offsets(points, copies, generator)])


def _pick(mass: Tensor, draw: float) -> int:
    """The position where the cumulative mass exceeds the fraction `draw` of the total."""
    # right=True: a point without mass, such as a centroid, is never picked
    return min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), len(mass) - 1)


def _small_offsets(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random offsets that are just large enough to separate two equal centroids."""
    return torch.randn(count, points.shape[1], generator=generator).to(points) * _step(points)


def _step(points: Tensor) -> Tensor:
    """A thousandth of the points' standard deviation."""
    return 1e-3 * (points - points.mean(dim=0)).square().mean().sqrt()
