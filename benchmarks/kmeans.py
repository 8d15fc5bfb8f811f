"""Our k-means compared to faiss, scikit-learn and the official routine: time to the same error, and the final error.

Legend: N points, K clusters, D dims. Error: mean squared distance to the nearest centroid.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import faiss
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from benchmarks.measure import Table
from tokenizer.clustering.kmeans import kmeans, partial_sums
from tokenizer.clustering.latents import InMemory, LatentBatch, T

POINTS = 2_000_000
CASES = ((1024, 5, 5), (4096, 5, 1), (16384, 5, 1), (1024, 8, 5))  # K, D, rounds
NEAR = 1.01  # times the lowest final error: the error up to which all sides are timed
FAISS_ITERATIONS = 50
SKLEARN_MAX_CLUSTERS = 4096  # for more, its k-means++ takes minutes
SKLEARN_S = 15  # it never stops by itself
SKLEARN_BATCH = 16_384
OFFICIAL_QUERIES = 16_384  # rows per chunk in its assignment


@dataclass
class Curve:
    """Seconds since the start, and the error of the centroids at that time."""

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def seconds_to(self, error: float) -> float | None:
        return next((s for s, e in zip(self.seconds, self.errors, strict=True) if e <= error), None)


def run() -> Table:
    table = Table(
        "k-means compared to faiss, scikit-learn and the official routine",
        [
            f"N = {POINTS} points from N(0, I), the distribution that VP-VAE's norm loss aims for. Each side has its "
            f"default settings, with two exceptions: `faiss` uses all points and {FAISS_ITERATIONS} iterations (its "
            "default, `faiss, default`, is 25 iterations on 256 points per cluster), and scikit-learn's "
            f"MiniBatchKMeans runs in batches of {SKLEARN_BATCH} for at most {SKLEARN_S} s, with the clock stopped "
            "while we measure its error.",
            f"same error: {NEAR} times the lowest final error of any side in that round. ratio: their time divided by "
            "ours.",
            "Ours stops when an iteration reduces the error by less than 0.01 %. Its time includes the seeding.",
            "The time of the official routine (k-means++ one by one over all points, then at most 200 iterations of "
            "distances and argmin) is estimated from 3 of its draws and one chunk of one iteration.",
            f"torch and faiss threads: {torch.get_num_threads()}. Medians over the rounds; the range is in "
            "parentheses.",
        ],
        ["K", "D", "rounds", "side", "s to same error", "ratio", "final error / best", "total, s"],
    )
    for num_clusters, dim, rounds in CASES:
        _measure(num_clusters, dim, rounds, table)
        print(*("  ".join(row) for row in table.rows[-5:]), sep="\n", flush=True)
    return table


def _measure(num_clusters: int, dim: int, rounds: int, table: Table) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())
    points = torch.randn(POINTS, dim, generator=torch.Generator().manual_seed(0))
    sides: dict[str, Callable[[Tensor, int, int], Curve]] = {"ours": ours, "faiss": by_faiss, "faiss, default": default}
    if num_clusters <= SKLEARN_MAX_CLUSTERS:
        sides["scikit-learn"] = by_sklearn
    found: dict[str, list[Curve]] = {name: [] for name in sides}
    for seed in range(rounds):
        for name in [*sides][seed % len(sides) :] + [*sides][: seed % len(sides)]:
            if seed == 0 or name != "scikit-learn":  # one round is enough: it is slow and far off
                found[name].append(sides[name](points, num_clusters, seed))
    best = [min(curves[r].errors[-1] for curves in found.values() if r < len(curves)) for r in range(rounds)]
    times = {n: [c.seconds_to(NEAR * b) for c, b in zip(curves, best, strict=False)] for n, curves in found.items()}
    for name, curves in found.items():
        table.rows.append(
            [
                *(str(num_clusters), str(dim), str(len(curves)), name),
                *(_spread(times[name]), _ratio(times[name], times["ours"])),
                _spread([c.errors[-1] / b for c, b in zip(curves, best, strict=False)], "{:.4f}"),
                f"{statistics.median(c.seconds[-1] for c in curves):.3g}",
            ]
        )
    estimate = official_estimate(points, num_clusters)
    table.rows.append([str(num_clusters), str(dim), "1", "official, estimated", "", "", "", f"{estimate:.3g}"])
    table.raw[f"K={num_clusters} D={dim}"] = {name: [vars(c) for c in curves] for name, curves in found.items()}


def _spread(values: list[float | None], form: str = "{:.3g}") -> str:
    """Median and range, or "never" if a side did not reach the error in most rounds."""
    there = sorted(value for value in values if value is not None)
    if 2 * len(there) <= len(values):
        return "never"
    text = form.format(statistics.median(there))
    return text if len(there) == 1 else f"{text} ({form.format(there[0])}..{form.format(there[-1])})"


def _ratio(theirs: list[float | None], ours: list[float | None]) -> str:
    return _spread([a / b if a is not None and b is not None else None for a, b in zip(theirs, ours, strict=False)])


# -- sides ----------------------------------------------------------------------------------------------------------


class Watched(InMemory):
    """Records the time and the error of each assignment of all points."""

    def __init__(self, points: Tensor):
        super().__init__(points)
        self.curve, self.start = Curve(), time.perf_counter()

    def total(self, function: Callable[[LatentBatch], T]) -> T:
        found = super().total(function)
        self.curve.seconds.append(time.perf_counter() - self.start)
        self.curve.errors.append(found.squared_error / len(self))  # type: ignore[attr-defined]
        return found


def ours(points: Tensor, num_clusters: int, seed: int) -> Curve:
    watched = Watched(points)
    kmeans(watched, num_clusters, seed=seed)
    return watched.curve


def by_faiss(points: Tensor, num_clusters: int, seed: int) -> Curve:
    """Its errors are those of the centroids before each update, like ours."""
    start = time.perf_counter()
    found = faiss.Kmeans(
        points.shape[1], num_clusters, niter=FAISS_ITERATIONS, seed=seed + 1, max_points_per_centroid=len(points)
    )
    found.train(points.numpy())
    before = time.perf_counter() - start - found.iteration_stats[-1]["time"]
    stats = found.iteration_stats
    return Curve([before + one["time"] for one in stats], [one["obj"] / len(points) for one in stats])


def default(points: Tensor, num_clusters: int, seed: int) -> Curve:
    start = time.perf_counter()
    found = faiss.Kmeans(points.shape[1], num_clusters, seed=seed + 1)
    found.train(points.numpy())
    return Curve([time.perf_counter() - start], [_error(points, found.centroids)])


def by_sklearn(points: Tensor, num_clusters: int, seed: int) -> Curve:
    model, curve, spent = MiniBatchKMeans(num_clusters, random_state=seed, n_init=1), Curve(), 0.0
    rng = np.random.default_rng(seed)
    while spent < SKLEARN_S:
        start = time.perf_counter()
        for _ in range(20):
            model.partial_fit(points.numpy()[rng.integers(len(points), size=SKLEARN_BATCH)])
        spent += time.perf_counter() - start
        curve.seconds.append(spent)
        curve.errors.append(_error(points, model.cluster_centers_.astype(np.float32)))
    return curve


def official_estimate(points: Tensor, num_clusters: int) -> float:
    """Seconds for the whole routine: K draws and 200 iterations, because its absolute tolerance is hardly ever met."""
    start = time.perf_counter()
    distance = torch.full((len(points),), torch.inf)
    for center in points[:3]:
        distance = torch.minimum(distance, (points - center).square().sum(dim=1))
        limit = distance[: 2**24].kthvalue(int(0.9 * min(len(distance), 2**24))).values
        torch.multinomial(distance.clamp(max=limit), 1)
    draws = (time.perf_counter() - start) / 3 * num_clusters
    some, centroids = points[:OFFICIAL_QUERIES], points[-num_clusters:]
    start = time.perf_counter()
    torch.cdist(some, centroids).argmin(dim=1)
    return draws + 200 * (time.perf_counter() - start) * len(points) / len(some)


def _error(points: Tensor, centroids: np.ndarray) -> float:
    return partial_sums(LatentBatch(points), torch.from_numpy(centroids)).squared_error / len(points)
