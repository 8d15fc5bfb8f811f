"""Nearest codeword and k-th nearest neighbour, exact, in float32 or better.

Legend: N queries, M points (a codebook or a queue of latents), D dims.
"""

from typing import Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

try:  # it has wheels for Linux, and elsewhere does not get along with torch's OpenMP
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

FAISS_MAX_POINTS = 2**16  # from where on the tree wins, up to TREE_MAX_DIM
MAX_SCORES = 2**23  # floats of one score tile (32 MB): larger tiles fall out of the cache and cost memory
TREE_MAX_DIM = 6  # above it a k-d tree visits most of its leaves and a matrix product wins
TREE_MIN_POINTS = 1024  # without faiss
EXACT_GPU_POINTS = 2**18  # a GPU scans this many points per query cheaply; a larger queue is thinned


def nearest_codeword(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword nearest to each z; of several as near it may be any.

    z [N, D], codebook [K, D] -> [N] int64. The road depends on (D, K, device) and the machine alone and never on N,
    so that a latent has the same index in every batch.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _nearest(z.detach().float(), codebook.detach().float())


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    num_codes, dim = codebook.shape
    tree_min_points = TREE_MIN_POINTS if faiss is None else FAISS_MAX_POINTS
    if z.device.type == "cpu" and dim <= TREE_MAX_DIM and num_codes >= tree_min_points:
        found = cKDTree(codebook.numpy()).query(z.numpy(), workers=torch.get_num_threads())[1]
        return torch.from_numpy(np.asarray(found, dtype=np.int64))
    center = codebook.mean(dim=0)  # small norms: the product form loses digits when latents lie far from 0
    z, codebook = z - center, codebook - center
    if z.device.type == "cpu" and faiss is not None:
        return _by_faiss(z, codebook)
    half_norms = codebook.square().sum(dim=1) / 2
    rows = max(1, MAX_SCORES // num_codes)
    parts = [argmax_rows(torch.addmm(-half_norms, part, codebook.T)) for part in z.split(rows)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=z.device)


def _by_faiss(z: Tensor, codebook: Tensor) -> Tensor:
    """faiss keeps scores in registers: up to 2^16 codes faster than a k-d tree, or a product and its argmax."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    # else small batches would take another road, 30 times slower, and an index must not depend on the batch
    faiss.cvar.distance_compute_blas_threshold = 1
    _, found = faiss.knn(z.numpy(), codebook.numpy(), 1)
    return torch.from_numpy(found[:, 0]).clamp_(min=0)  # it gives -1 for NaN, of which others will tell


def argmax_rows(scores: Tensor) -> Tensor:
    """Position of the largest score of each row, the first of equals: [N, K] -> [N] int64."""
    if scores.device.type == "cpu":  # numpy's is 3.5 times faster than torch's
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)


class NeighborIndex(Protocol):
    """Points that can be asked how far their k-th nearest lies."""

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        """Distance from each query to its k-th nearest point, for each k (1 is the nearest).

        queries [N, D] -> [N, len(ks)] float32, same unit as the points.
        """
        ...


class KDTreeIndex:
    """k-d tree on the CPU: exact, and by far the cheapest up to about 6 dims."""

    def __init__(self, points: Tensor):
        # unbalanced trees build twice as fast and are as quick to ask here (median splits buy nothing)
        self.tree = cKDTree(
            points.detach().float().cpu().numpy(), balanced_tree=False, compact_nodes=False, leafsize=32
        )

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        found = self.tree.query(queries.detach().float().cpu().numpy(), k=ks, workers=torch.get_num_threads())[0]
        return torch.from_numpy(np.asarray(found, dtype=np.float32)).to(queries.device)


class TiledIndex:
    """Tiles of a matrix product with a running list of the nearest: exact, any device, never N x M in memory."""

    def __init__(self, points: Tensor):
        points = points.detach().float()
        self.center = points.mean(dim=0)
        self.points = points - self.center

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        queries = queries.detach().float() - self.center
        with torch.autocast(queries.device.type, enabled=False):
            nearest = [self._positions(part, max(ks)) for part in queries.split(1024)]
        picked = (torch.cat(nearest) if nearest else queries.new_empty(0, max(ks), dtype=torch.int64))[
            :, [k - 1 for k in ks]
        ]
        # the product form ranks well but loses digits near 0: measure the chosen ones again
        return (self.points[picked] - queries[:, None, :]).norm(dim=2)

    def _positions(self, queries: Tensor, k: int) -> Tensor:
        """Positions of the k nearest points, nearest first: [n, D] -> [n, k]."""
        best = queries.new_empty(len(queries), 0)
        where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        tile = max(k, MAX_SCORES // max(1, len(queries)))
        for start in range(0, len(self.points), tile):
            points = self.points[start : start + tile]
            score = torch.addmm(-points.square().sum(dim=1) / 2, queries, points.T)
            top = score.topk(min(k, len(points)), dim=1)
            best = torch.cat([best, top.values], dim=1)
            where = torch.cat([where, top.indices + start], dim=1)
            keep = best.topk(min(k, best.shape[1]), dim=1).indices
            best, where = best.gather(1, keep), where.gather(1, keep)
        return where


class SubsampledIndex:
    """One of r points, asked for its (k / r)-th neighbour: the same radius in expectation for 1/r of the work.

    At r = 4 the radius is off by 0.5 % on average with a spread of 5 % a query (methods.md section 16).
    """

    def __init__(self, points: Tensor, stride: int = 4):
        self.stride = stride
        # drawn, not every r-th: latents come row by row of a picture, and a stride would see some of its columns only
        drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[: -(-len(points) // stride)]
        self.index = (TiledIndex if points.is_cuda else KDTreeIndex)(points[drawn.to(points.device)])

    def kth_distances(self, queries: Tensor, ks: list[int]) -> Tensor:
        return self.index.kth_distances(queries, [max(1, round(k / self.stride)) for k in ks])


BACKENDS: dict[str, type[KDTreeIndex] | type[TiledIndex] | type[SubsampledIndex]] = {
    "kdtree": KDTreeIndex,
    "gemm": TiledIndex,
    "subsample": SubsampledIndex,
}


def choose_backend(num_points: int, dim: int, device: torch.device) -> str:
    """The cheapest back-end for that many points of that many dims on that device."""
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
