"""Nearest codeword and k-th neighbour, compared to brute force in float64."""

import pytest
import torch
from torch import Tensor

from tokenizer.clustering import neighbors
from tokenizer.clustering.neighbors import (
    BACKENDS,
    TREE_MAX_DIM,
    TREE_MIN_POINTS,
    KDTreeIndex,
    SubsampledIndex,
    TiledIndex,
    build_index,
    choose_backend,
    nearest_codeword,
)

TREE, MATRIX = (TREE_MIN_POINTS, 4), (512, 4)  # (codes, dims) for the tree and the matrix product without faiss


@pytest.fixture(autouse=True, params=["with faiss", "without"])
def faiss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test with every algorithm."""
    if request.param == "without":
        monkeypatch.setattr(neighbors, "faiss", None)
    elif neighbors.faiss is None:
        pytest.skip("faiss-cpu is installed only on Linux")


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(z: Tensor, points: Tensor) -> Tensor:
    return torch.cdist(z.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")


# -- nearest codeword -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 50.0, 1000.0])
@pytest.mark.parametrize(
    ("num_codes", "dim"), [TREE, MATRIX, (2048, TREE_MAX_DIM), (2048, TREE_MAX_DIM + 1), (300, 64)]
)
def test_nearest_codeword_is_that_of_float64_brute_force(num_codes, dim, mean):
    z, codebook = mean + normals(3000, dim, seed=1), mean + normals(num_codes, dim)
    exact = distances(z, codebook)
    found = exact.gather(1, nearest_codeword(z, codebook)[:, None])[:, 0]
    nearest = exact.min(dim=1).values
    assert (found.square() - nearest.square() <= 1e-6 * (z - mean).square().sum(dim=1)).all()
    assert (nearest_codeword(z, codebook) != exact.argmin(dim=1)).float().mean() < 1e-3


def test_a_far_codeword_costs_no_precision_that_changes_an_index():
    codebook = normals(512, 4)
    codebook[0] = 200.0
    z = normals(2000, 4, seed=1)
    assert (nearest_codeword(z, codebook) != distances(z, codebook).argmin(dim=1)).float().mean() < 1e-3


@pytest.mark.parametrize(("num_codes", "dim"), [TREE, MATRIX])
def test_no_latents_have_no_indices(num_codes, dim):
    found = nearest_codeword(torch.empty(0, dim), normals(num_codes, dim))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_of_equally_near_codes_the_matrix_road_takes_the_lowest(monkeypatch):
    monkeypatch.setattr(neighbors, "faiss", None)
    codebook = torch.tensor([[3.0, 3.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_codeword(torch.tensor([[0.0, -1.0], [2.0, 0.0], [0.0, 0.0]]), codebook).tolist() == [1, 1, 1]


def test_a_latent_has_the_same_index_in_every_batch():
    codebook, z = normals(600, 3), normals(1000, 3, seed=2)
    if (
        neighbors.faiss is not None
    ):  # also for equal or equally near codes, where rounding decides the result of a matrix product
        codebook, z = codebook.round(), z.round() / 2
    whole = nearest_codeword(z, codebook)
    for size in (1, 7, 19, 333):
        assert torch.equal(torch.cat([nearest_codeword(part, codebook) for part in z[:500].split(size)]), whole[:500])


def test_every_code_is_its_own_nearest():
    for num_codes, dim in (TREE, MATRIX):
        codebook = normals(num_codes, dim)
        assert torch.equal(nearest_codeword(codebook, codebook), torch.arange(num_codes))


def test_one_code_is_nearest_to_all():
    assert nearest_codeword(normals(5, 3), normals(1, 3)).tolist() == [0] * 5


def test_more_latents_than_one_tile_holds_are_all_answered(monkeypatch):
    z, codebook = normals(1000, 4, seed=1), normals(512, 4)
    whole = nearest_codeword(z, codebook)
    monkeypatch.setattr("tokenizer.clustering.neighbors.MAX_SCORES", 512 * 7)
    assert torch.equal(nearest_codeword(z, codebook), whole)


def test_bfloat16_latents_are_measured_in_float32():
    z, codebook = normals(500, 4, seed=1).bfloat16(), normals(512, 4)
    assert torch.equal(nearest_codeword(z, codebook), distances(z.float(), codebook).argmin(dim=1))


def test_autocast_does_not_reach_the_search():
    z, codebook = normals(500, 4, seed=1), normals(512, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_codeword(z, codebook)
    assert torch.equal(found, nearest_codeword(z, codebook))


# -- k-th neighbour -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [KDTreeIndex, TiledIndex])
@pytest.mark.parametrize("mean", [0.0, 50.0])
@pytest.mark.parametrize("dim", [3, 5, 12])
def test_exact_back_ends_equal_float64_brute_force(backend, mean, dim):
    points, queries = mean + normals(5000, dim), mean + normals(300, dim, seed=1)
    found = backend(points).kth_distances(queries, [1, 8, 80])
    exact = distances(queries, points).sort(dim=1).values[:, [0, 7, 79]]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_tiles_that_split_the_points_change_nothing(monkeypatch):
    points, queries = normals(1000, 4), normals(100, 4, seed=1)
    whole = TiledIndex(points).kth_distances(queries, [1, 8, 64])
    monkeypatch.setattr("tokenizer.clustering.neighbors.MAX_SCORES", 100 * 70)
    torch.testing.assert_close(TiledIndex(points).kth_distances(queries, [1, 8, 64]), whole)


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_ks_are_answered_in_the_order_they_are_asked(backend):
    index, queries = backend(normals(2000, 4)), normals(50, 4, seed=1)
    both = index.kth_distances(queries, [64, 8])
    assert torch.equal(both, index.kth_distances(queries, [8, 64]).flip(1))
    assert (both[:, 0] > both[:, 1]).all()


def test_subsampled_radius_is_unbiased_with_the_spread_of_theory():
    points, queries = normals(4 * 16384, 4), normals(2000, 4, seed=1)
    ratio = SubsampledIndex(points).kth_distances(queries, [64]) / KDTreeIndex(points).kth_distances(queries, [64])
    assert float(ratio.mean()) == pytest.approx(
        1, abs=0.01
    )  # .995 was measured; see the table of costs in docs/methods.md
    assert float(ratio.std()) == pytest.approx(1 / (4 * 16**0.5), abs=0.015)  # 1 / (d sqrt(M / r)) = .0625


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_later_changes_of_the_points_do_not_reach_an_index(backend):
    points, queries = normals(500, 4), normals(20, 4, seed=1)
    index = backend(points)
    before = index.kth_distances(queries, [8])
    points.zero_()
    assert torch.equal(index.kth_distances(queries, [8]), before)


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_no_queries_have_no_distances(backend):
    assert backend(normals(500, 4)).kth_distances(torch.empty(0, 4), [8, 64]).shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_equal_points_lie_at_distance_zero(backend):
    index = backend(torch.full((500, 4), 0.3))
    assert index.kth_distances(torch.full((3, 4), 0.3), [8, 64]).tolist() == [[0, 0]] * 3


def test_cheapest_back_end_by_dimension_device_and_size():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_backend(65536, dim, cpu) for dim in (4, 12, 13, 64)] == ["kdtree", "kdtree", "gemm", "gemm"]
    assert [choose_backend(points, 4, gpu) for points in (65536, 2**20)] == ["gemm", "subsample"]
    assert isinstance(build_index(normals(100, 4)), KDTreeIndex)


def test_an_unknown_back_end_lists_the_known():
    with pytest.raises(ValueError, match="'faiss'; choose auto, kdtree, gemm, subsample"):
        build_index(normals(10, 2), "faiss")
