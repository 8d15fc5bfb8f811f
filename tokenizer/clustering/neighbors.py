"""Nearest codeword and k-th nearest neighbour, exact and in float32 or better.

Legend: N queries, M points (a codebook or a queue of latents), D dims.
"""

from typing import Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

try:  # installed only on Linux: elsewhere it has no wheels or conflicts with torch's OpenMP
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

FAISS_MAX_POINTS = 2**16  # above it the tree is faster, up to TREE_MAX_DIM
MAX_SCORES = 2**23  # floats per tile of scores (32 MB): larger tiles do not fit the cache and cost memory
TREE_MAX_DIM = 6  # above it, a k-d tree visits most of its leaves, and a matrix product is faster
TREE_MIN_POINTS = 1024  # below it, the matrix product is faster; used without faiss
EXACT_GPU_POINTS = 2**18  # a GPU scans this many points per query cheaply; a larger queue is subsampled
SUBSAMPLE_STRIDE = 4  # SubsampledIndex keeps one of this many points


def nearest_codeword(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword nearest to each z; ties may go to any of the nearest.

    z [N, D], codebook [K, D] -> [N] int64. The algorithm depends only on D, K, the device and the machine, never on N,
    so a latent has the same index in every batch.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _nearest(z.detach().float(), codebook.detach().float())


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    num_codes, dim = codebook.shape
    tree_min_points = TREE_MIN_POINTS if faiss is None else FAISS_MAX_POINTS
    if z.device.type == "cpu" and dim <= TREE_MAX_DIM and num_codes >= tree_min_points:
        indices = cKDTree(codebook.numpy()).query(z.numpy(), workers=torch.get_num_threads())[1]
        return torch.from_numpy(np.asarray(indices, dtype=np.int64))
    center = codebook.mean(dim=0)  # keeps norms small: the product form loses precision for latents far from 0
    z, codebook = z - center, codebook - center
    if z.device.type == "cpu" and faiss is not None:
        return _by_faiss(z, codebook)
    half_norms = codebook.square().sum(dim=1) / 2
    rows = max(1, MAX_SCORES // num_codes)
    parts = [argmax_rows(torch.addmm(-half_norms, part, codebook.T)) for part in z.split(rows)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=z.device)


def _by_faiss(z: Tensor, codebook: Tensor) -> Tensor:
    """faiss keeps scores in registers: up to 2^16 codes it is faster than a k-d tree and than a product with argmax."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    # otherwise small batches use another, 30 times slower algorithm, and an index must not depend on the batch
    faiss.cvar.distance_compute_blas_threshold = 1
    _, indices = faiss.knn(z.numpy(), codebook.numpy(), 1)
    return torch.from_numpy(indices[:, 0]).clamp_(min=0)  # faiss gives -1 for NaN, which callers check elsewhere


def argmax_rows(scores: Tensor) -> Tensor:
    """Position of the largest score of each row, the first one if several are equal: [N, K] -> [N] int64."""
    if scores.device.type == "cpu":  # numpy's is 3.5 times faster than torch's
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)


class NeighborIndex(Protocol):
    """Points to search for the distance of the k-th nearest one."""

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        """Distance from each query to its k-th nearest point, for each k in ks; k = 1 is the nearest.

        queries [N, D] -> [N, len(ks)] float32, same unit as the points.
        """
        ...


class KDTreeIndex:
    """k-d tree on the CPU: exact, and by far the fastest up to about 6 dims."""

    def __init__(self, points: Tensor):
        # an unbalanced tree builds twice as fast, and queries are no slower
        self.tree = cKDTree(
            points.detach().float().cpu().numpy(), balanced_tree=False, compact_nodes=False, leafsize=32
        )

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        distances = self.tree.query(queries.detach().float().cpu().numpy(), k=ks, workers=torch.get_num_threads())[0]
        return torch.from_numpy(np.asarray(distances, dtype=np.float32)).to(queries.device)


class TiledIndex:
    """A tiled matrix product with a running list of the nearest points. Exact, on any device, without N x M memory."""

    def __init__(self, points: Tensor):
        points = points.detach().float()
        self.center = points.mean(dim=0)
        self.points = points - self.center

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        queries = queries.detach().float() - self.center
        with torch.autocast(queries.device.type, enabled=False):
            nearest = [self._positions(part, max(ks)) for part in queries.split(1024)]
        positions = torch.cat(nearest) if nearest else queries.new_empty(0, max(ks), dtype=torch.int64)
        # the product form ranks well but is imprecise near 0, so the distances are computed again
        return (self.points[positions[:, [k - 1 for k in ks]]] - queries[:, None, :]).norm(dim=2)

    def _positions(self, queries: Tensor, k: int) -> Tensor:
        """Positions of the k nearest points, nearest first: [n, D] -> [n, k]."""
        best = queries.new_empty(len(queries), 0)
        positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        tile = max(k, MAX_SCORES // max(1, len(queries)))
        for start in range(0, len(self.points), tile):
            points = self.points[start : start + tile]
            score = torch.addmm(-points.square().sum(dim=1) / 2, queries, points.T)
            top = score.topk(min(k, len(points)), dim=1)
            best = torch.cat([best, top.values], dim=1)
            positions = torch.cat([positions, top.indices + start], dim=1)
            keep = best.topk(min(k, best.shape[1]), dim=1).indices
            best, positions = best.gather(1, keep), positions.gather(1, keep)
        return positions


class SubsampledIndex:
    """Searches a random 1/r of the points for the (k / r)-th neighbour: the same expected radius for 1/r of the work.

    r is SUBSAMPLE_STRIDE. At r = 4 the radius has a bias of 0.5 % and a standard deviation of 5 % per query.
    """

    def __init__(self, points: Tensor):
        # random, since a fixed stride over latents in row order of the pictures would hit only some columns
        count = -(-len(points) // SUBSAMPLE_STRIDE)
        drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
        self.index = (TiledIndex if points.is_cuda else KDTreeIndex)(points[drawn.to(points.device)])

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        return self.index.kth_distances(queries, [max(1, round(k / SUBSAMPLE_STRIDE)) for k in ks])


BACKENDS: dict[str, type[KDTreeIndex] | type[TiledIndex] | type[SubsampledIndex]] = {
    "kdtree": KDTreeIndex,
    "gemm": TiledIndex,
    "subsample": SubsampledIndex,
}


def choose_backend(num_points: int, dim: int, device: torch.device) -> str:
    """The fastest back-end for num_points points of dim dimensions on this device."""
    if device.type == "cpu":
        return "kdtree" if dim <= 2 * TREE_MAX_DIM else "gemm"
    return "gemm" if num_points <= EXACT_GPU_POINTS else "subsample"


def build_index(points: Tensor, backend: str = "auto") -> NeighborIndex:
    """An index over points [M, D]; backend is auto, kdtree, gemm or subsample."""
    if backend == "auto":
        backend = choose_backend(points.shape[0], points.shape[1], points.device)
    if backend not in BACKENDS:
        raise ValueError(f"unknown neighbour back-end {backend!r}; choose auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](points)
