"""Shared code of the scalar quantizers: levels per dimension, and the index of a vector of levels.

The first dimension is the least significant: index = sum_i level_i * prod_{j<i} levels_j.
"""

import itertools
import math

import torch
from torch import Tensor, nn

PAPER_LEVELS = {  # arXiv 2309.15505 table 1 and arXiv 2602.17133 appendix A.1
    256: [8, 6, 5],
    1024: [8, 5, 5, 5],
    4096: [7, 5, 5, 5, 5],
    16384: [8, 8, 8, 6, 5],
}
MIN_LEVELS, MAX_LEVELS = 3, 16  # FSQ recommends at least 5; 3 is used only if nothing else comes close


def levels_for(codebook_size: int) -> list[int]:
    """Levels per dimension: those of the papers for their sizes, otherwise about equal levels whose product is closest
    to codebook_size: within 6 % below 60 codes, 4 % below 500, 2 % above.

    Among equally close products it takes the fewest dimensions, then the most even levels. Raises ValueError below 3.
    """
    if codebook_size in PAPER_LEVELS:
        return PAPER_LEVELS[codebook_size]
    if codebook_size < MIN_LEVELS:
        raise ValueError(f"quantizer.codebook_size is {codebook_size}; a scalar quantizer needs {MIN_LEVELS} or more")
    if codebook_size <= MAX_LEVELS:
        return [codebook_size]
    fewest = math.ceil(math.log(codebook_size, MAX_LEVELS))
    most = max(fewest, round(math.log(codebook_size, 5)))
    candidates = []
    for dim in range(fewest, most + 1):
        root = round(codebook_size ** (1 / dim))
        sides = range(max(MIN_LEVELS, root - 2), min(MAX_LEVELS, root + 3) + 1)
        candidates += [levels[::-1] for levels in itertools.combinations_with_replacement(sides, dim)]

    def rank(levels: tuple[int, ...]) -> tuple[int, int, int]:
        return abs(math.prod(levels) - codebook_size), len(levels), levels[0] - levels[-1]

    best = min(candidates, key=rank)
    return list(best)


def check_levels(levels: list[int]) -> None:
    """Raises ValueError if a dimension has fewer than 2 levels."""
    if any(level < 2 for level in levels):
        raise ValueError(f"quantizer.levels is {list(levels)}; each must be 2 or more")


class MixedRadix(nn.Module):
    """Vectors of levels [N, D] int64 to indices [N] int64 and back."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: list[int]):
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def pack(self, digits: Tensor) -> Tensor:
        return (digits * self.basis).sum(dim=-1)

    def unpack(self, indices: Tensor) -> Tensor:
        return indices[:, None] // self.basis % self.levels
