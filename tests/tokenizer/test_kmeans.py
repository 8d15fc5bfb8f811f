"""Lloyd's algorithm, compared to cases solved by hand and to a simple numpy version with the same start."""

import operator
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.clustering.kmeans import PartialSums, first_centroids, kmeans, new_centroids, partial_sums, plus_plus
from tokenizer.clustering.latents import InMemory, LatentBatch

RECTANGLE = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(points: Tensor) -> Tensor:
    return torch.ones(len(points), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numpy_lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """A simple version in float64, for clusters that never become empty."""
    mse = []
    for _ in range(iterations):
        squared = ((points[:, None, :] - centroids[None]) ** 2).sum(axis=2)
        nearest = squared.argmin(axis=1)
        mse.append(squared.min(axis=1).mean())
        centroids = np.stack([points[nearest == k].mean(axis=0) for k in range(len(centroids))])
    return centroids, mse


def run_lloyd(points: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, list[float]]:
    errors = []
    for _ in range(iterations):
        total = partial_sums(LatentBatch(points), centroids)
        errors.append(total.squared_error / len(points))
        centroids = new_centroids(centroids, total, generator())
    return centroids, errors


# -- by hand --------------------------------------------------------------------------------------------------------


def test_a_rectangle_of_four_points_in_two_clusters():
    """The means of the short sides, (0, 1) and (10, 1). The distance of each point to its mean is 1."""
    found = kmeans(RECTANGLE, 2, seed=0)
    assert sorted(found.centroids.tolist()) == [[0, 1], [10, 1]]
    assert found.mse[-1] == 1.0


def test_partial_sums_of_the_rectangle():
    sums = partial_sums(LatentBatch(RECTANGLE), torch.tensor([[0.0, 0.0], [10.0, 1.0]]))
    assert sums.counts.tolist() == [2, 2]
    assert sums.sums.tolist() == [[0, 2], [20, 2]]
    assert sums.squared_error == 4 + 1 + 1


def test_one_cluster_is_the_mean():
    points = normals(500, 3)
    found = kmeans(points, 1)
    torch.testing.assert_close(found.centroids[0], points.mean(dim=0))
    assert found.mse[-1] == pytest.approx(float(points.var(dim=0, unbiased=False).sum()), rel=1e-5)


# -- Lloyd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clusters", "dim"), [(8, 2), (32, 4), (20, 16)])
def test_equals_a_plain_numpy_lloyd_from_the_same_start(clusters, dim):
    points = normals(2000, dim)
    start = first_centroids(LatentBatch(points), clusters, generator())
    found, errors = run_lloyd(points, start, 15)
    expected, expected_errors = numpy_lloyd(points.double().numpy(), start.double().numpy(), 15)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(errors, expected_errors, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_error_never_rises(seed):
    errors = kmeans(normals(3000, 4, seed=seed), 64, seed=seed).mse
    assert len(errors) > 5
    assert all(after <= before for before, after in pairwise(errors))


def test_it_stops_at_the_first_improvement_below_the_tolerance():
    errors = kmeans(normals(3000, 4), 64, tolerance=1e-2).mse
    gains = [(before - after) / before for before, after in pairwise(errors)]
    assert gains[-1] <= 1e-2 < min(gains[:-1])


def test_last_error_is_that_of_the_centroids_returned():
    points = normals(2000, 4)
    found = kmeans(points, 32)
    assert found.mse[-1] == partial_sums(LatentBatch(points), found.centroids).squared_error / len(points)


def test_max_iterations_is_kept():
    assert len(kmeans(normals(2000, 4), 32, max_iterations=3, tolerance=0).mse) == 3


def test_same_seed_same_result_and_another_seed_another():
    points = normals(5000, 4)
    first, again, other = (kmeans(points, 64, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.centroids, again.centroids)
    assert first.mse == again.mse
    assert not torch.equal(first.centroids, other.centroids)


def test_global_random_state_is_neither_read_nor_moved():
    points, before = normals(1000, 4), torch.get_rng_state()
    first = kmeans(points, 16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(kmeans(points, 16).centroids, first.centroids)


def test_moving_the_points_far_from_zero_moves_the_centroids_along():
    points = normals(2000, 4)
    torch.testing.assert_close(kmeans(points + 64, 32).mse[-1], kmeans(points, 32).mse[-1], rtol=0.02, atol=0)


# -- parts ----------------------------------------------------------------------------------------------------------


def test_sums_over_parts_are_the_sums_over_the_whole():
    points, centroids = normals(3000, 4), normals(50, 4, seed=1)
    whole = partial_sums(LatentBatch(points), centroids)
    halves = partial_sums(LatentBatch(points[:1234]), centroids) + partial_sums(LatentBatch(points[1234:]), centroids)
    assert torch.equal(halves.counts, whole.counts)
    torch.testing.assert_close(halves.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert halves.squared_error == pytest.approx(whole.squared_error, rel=1e-12)


def test_sums_of_no_points_are_zero():
    sums = partial_sums(LatentBatch(torch.empty(0, 3)), normals(5, 3))
    assert sums.counts.tolist() == [0] * 5
    assert sums.sums.tolist() == [[0, 0, 0]] * 5
    assert sums.squared_error == 0


# -- empty clusters and few points ----------------------------------------------------------------------------------


def sums_of(counts: list[int], sums: list[list[float]], errors: list[float]) -> PartialSums:
    """Sums for points that all have weight 1."""
    number = torch.tensor(counts)
    return PartialSums(number, number.double(), torch.tensor(sums).double(), torch.tensor(errors).double())


def test_an_empty_cluster_takes_half_of_a_large_one():
    points = torch.cat([normals(100, 2), normals(300, 2, seed=1) + 20])
    centroids, _ = run_lloyd(points, torch.tensor([[0.0, 0.0], [20.0, 20.0], [900.0, 900.0]]), 5)
    counts = partial_sums(LatentBatch(points), centroids).counts
    assert counts[0] == 100
    assert counts[1:].sum() == 300
    assert counts.min() > 50


def test_an_empty_cluster_lands_just_beside_the_mean_of_the_one_that_errs_most():
    total = sums_of([4, 0, 9], [[8.0, 0.0], [0.0, 0.0], [45.0, 45.0]], [2.0, 0.0, 1.0])
    found = new_centroids(torch.zeros(3, 2), total, generator())
    torch.testing.assert_close(found[0], torch.tensor([2.0, 0.0]), rtol=0, atol=0.02)
    assert 0 < float((found[1] - found[0]).norm()) < 0.04
    assert found[2].tolist() == [5, 5]


def test_a_cluster_of_one_point_is_not_split():
    total = sums_of([1, 0], [[3.0], [0.0]], [1.0, 0.0])
    assert new_centroids(torch.tensor([[3.0], [7.0]]), total, generator()).tolist() == [[3], [7]]


def test_an_atom_is_not_split():
    points = torch.cat([normals(50, 4), torch.full((1000, 4), 0.7)])
    errors = kmeans(points, 64).mse
    assert max(errors) < 1e-9  # only rounding errors, because every distinct point is a centroid


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "make",
    [
        lambda z: z,
        lambda z: z.round(),  # many equal points
        lambda z: torch.cat([z[:300], 100 + z[300:]]),
        lambda z: torch.cat([z[:50], z[:1].expand(250, 3)]),
        lambda z: z * torch.tensor([1.0, 1e-3, 0.0]),
    ],
    ids=["normal", "atoms", "far", "silence", "flat"],
)
def test_a_split_never_raises_the_error(make, seed):
    """Every initial centroid occurs twice, so half of the clusters are empty."""
    points = make(normals(600, 3, seed=seed))
    _, errors = run_lloyd(points, points[:32].repeat(2, 1), 30)
    assert errors[-1] < errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_fewer_points_than_clusters_are_all_centroids(count):
    points = normals(count, 4)
    found = kmeans(points, 8)
    assert found.centroids.shape == (8, 4)
    assert found.centroids.isfinite().all()
    assert (points[:, None] == found.centroids).all(dim=2).any(dim=1).all()
    assert found.mse[-1] == 0


def test_equal_points_give_that_point_k_times():
    found = kmeans(torch.full((100, 3), 2.5), 4)
    assert found.centroids.tolist() == [[2.5] * 3] * 4
    assert found.mse[-1] == 0


def test_no_points_are_refused():
    with pytest.raises(ValueError, match="at least one point"):
        kmeans(torch.empty(0, 3), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_no_numbers_are_refused_by_name(value):
    points = normals(100, 3)
    points[17, 1] = value
    with pytest.raises(ValueError, match="latents that are NaN or infinite; check whether training diverged"):
        kmeans(points, 4)


# -- seeding --------------------------------------------------------------------------------------------------------


def test_seeding_takes_points_and_no_point_twice():
    points = normals(500, 3)
    seeds = first_centroids(LatentBatch(points), 100, generator())
    assert (seeds[:, None] == points).all(dim=2).any(dim=1).all()
    assert len(seeds.unique(dim=0)) == 100


@pytest.mark.parametrize("seed", range(10))
def test_seeding_finds_every_far_cluster(seed):
    """Six clusters, 100 apart and .1 wide: after each draw, the clusters found so far have a millionth of the mass."""
    centers = 100 * torch.eye(6)
    points = (centers[:, None, :] + 0.1 * normals(6, 200, 6)).reshape(-1, 6)
    seeds = plus_plus(points, ones(points), 6, generator(seed))
    assert sorted(torch.cdist(seeds, centers).argmin(dim=1).tolist()) == list(range(6))


def test_seeding_draws_by_squared_distance():
    """Solved by hand. From 0, the points 1 and 3 have weights 1 and 9; from 1: 1 and 4; from 3: 9 and 4."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    pairs = [tuple(plus_plus(points, ones(points), 2, generator(seed))[:, 0].tolist()) for seed in range(3000)]
    firsts = [sum(pair[0] == first for pair in pairs) for first in (0.0, 1.0, 3.0)]
    assert [count / 3000 for count in firsts] == pytest.approx([1 / 3] * 3, abs=0.035)
    assert pairs.count((0.0, 3.0)) / firsts[0] == pytest.approx(0.9, abs=0.04)
    assert pairs.count((1.0, 3.0)) / firsts[1] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_candidates_drawn_many_at_a_time_find_nearly_every_far_cluster(seed):
    """300 distant clusters of 40 points: k-means++ misses at most one of them; uniform draws would miss a third."""
    centers = 100 * torch.rand(300, 5, generator=generator(9))
    points = (centers[:, None] + 0.1 * normals(300, 40, 5)).reshape(-1, 5)
    seeds = first_centroids(LatentBatch(points), 300, generator(seed))
    assert len(torch.cdist(seeds, centers).argmin(dim=1).unique()) >= 297


def test_candidates_have_the_weight_of_what_they_stand_for():
    """Of two blobs with equal spread and size, one has a hundred times the weight and gets nearly all seeds."""
    points = torch.cat([normals(2000, 2), 1000 + normals(2000, 2, seed=1)])
    weights = torch.cat([torch.ones(2000), torch.full((2000,), 100.0)])
    seeds = first_centroids(LatentBatch(points, weights), 100, generator())
    assert int((seeds[:, 0] > 500).sum()) > 85


# -- from a smaller codebook ----------------------------------------------------------------------------------------


def test_centroids_to_start_from_stay_first_and_others_are_added():
    points, start = normals(3000, 3), normals(20, 3, seed=5)
    seeds = first_centroids(LatentBatch(points), 100, generator(), start)
    assert torch.equal(seeds[:20], start)
    assert len(seeds.unique(dim=0)) == 100


def test_a_start_from_a_smaller_codebook_ends_as_well_as_a_fresh_one():
    points = normals(20_000, 4)
    small = kmeans(points, 64)
    warm, fresh = kmeans(points, 128, start=small.centroids), kmeans(points, 128)
    assert warm.mse[-1] == pytest.approx(fresh.mse[-1], rel=0.01)


# -- a sample settles first -----------------------------------------------------------------------------------------


def test_of_many_points_a_sample_settles_first_and_all_of_them_end_as_well():
    """4000 points per cluster: Lloyd on samples first saves iterations over all points, and the result is the same."""
    points = normals(64_000, 3)
    found = kmeans(points, 16)
    _, errors = run_lloyd(points, first_centroids(LatentBatch(points), 16, generator()), 60)
    assert found.mse[0] < errors[3]
    assert found.mse[-1] == pytest.approx(errors[-1], rel=0.01)


class InParts:
    """Points in several parts, as on a cluster, but in one process."""

    def __init__(self, parts: list[LatentBatch], everything: InMemory):
        self.parts, self.everything = parts, everything

    def __len__(self) -> int:
        return len(self.everything)

    def sample(self, count: int, seed: int) -> LatentBatch:
        return self.everything.sample(count, seed)

    def total(self, function):
        return reduce(operator.add, map(function, self.parts))


def test_points_in_parts_give_the_centroids_of_the_whole():
    points = normals(30_000, 4)
    whole = InMemory(points)
    parts = InParts([LatentBatch(some) for some in points.split(7000)], whole)
    found, expected = kmeans(parts, 64), kmeans(whole, 64)
    torch.testing.assert_close(found.centroids, expected.centroids, rtol=0, atol=1e-5)
    assert found.mse == pytest.approx(expected.mse, rel=1e-7)


def test_good_seeds_beat_random_ones():
    points = (20 * torch.rand(40, 1, 2, generator=generator()) + 0.1 * normals(40, 50, 2)).reshape(-1, 2)
    good, random = (
        plus_plus(points, ones(points), 40, generator()),
        points[torch.randperm(2000, generator=generator())[:40]],
    )
    assert (
        partial_sums(LatentBatch(points), good).squared_error
        < 0.5 * partial_sums(LatentBatch(points), random).squared_error
    )


# -- weights --------------------------------------------------------------------------------------------------------


def test_a_weight_counts_like_that_many_copies():
    points, centroids = normals(200, 3), normals(8, 3, seed=1)
    weights = torch.randint(1, 5, (200,), generator=generator())
    weighted = partial_sums(LatentBatch(points, weights), centroids)
    copies = partial_sums(LatentBatch(points.repeat_interleave(weights, dim=0)), centroids)
    assert torch.equal(weighted.mass, copies.counts.double())
    torch.testing.assert_close(weighted.sums, copies.sums)
    torch.testing.assert_close(weighted.errors, copies.errors)


def test_equal_weights_change_nothing():
    points = normals(500, 2)
    plain, weighted = kmeans(points, 10), kmeans(InMemory(points, torch.full((500,), 4.0)), 10)
    torch.testing.assert_close(plain.centroids, weighted.centroids)
    assert plain.mse == pytest.approx(weighted.mse)


def test_codes_go_where_the_weight_is():
    """Of two equal blobs, one has a hundred times the weight and gets nearly all codes."""
    points = torch.cat([normals(1000, 2), 50 + normals(1000, 2, seed=1)])
    weights = torch.cat([torch.ones(1000), torch.full((1000,), 100.0)])
    plain, weighted = kmeans(points, 32).centroids, kmeans(InMemory(points, weights), 32).centroids
    assert 12 <= int((plain[:, 0] > 25).sum()) <= 20
    assert int((weighted[:, 0] > 25).sum()) > 24
