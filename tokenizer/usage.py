"""Codebook usage: how many of the codes a corpus uses, and how evenly.

counts [K]: how often each code was chosen, or the share of each.
"""

import numpy as np


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the codes, in codes: 1 (one code only) .. K (all alike). 0 without any token."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def count_codes(tokens: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each code was chosen by each of Q quantizers: tokens [Q, ...] -> [Q, K] int64."""
    return np.stack([np.bincount(chosen.ravel(), minlength=codebook_size) for chosen in tokens])


def usage(counts: np.ndarray, target_size: int | None = None) -> dict[str, float]:
    """CVU (arXiv 2602.17133, eq. 19) by the actual and the target number of codes, perplexity, utilisation.

    counts [K] int64, or [Q, K] of Q quantizers, whose means are given. A scalar quantizer has another number of codes
    than it was asked for (1000 for 1024): both CVUs are given. Mind the finite sample: 16,384 uniform tokens over 1024
    codes read 992, and 1,024 tokens 577.
    """
    counts = np.atleast_2d(counts)
    codebook_size = counts.shape[1]
    codes = float(np.mean([perplexity(row) for row in counts]))
    return {
        "num_tokens": int(counts.sum()),
        "codebook_size": codebook_size,
        "num_quantizers": len(counts),
        "target_size": target_size or codebook_size,
        "perplexity": codes,
        "cvu": codes / codebook_size,
        "cvu_target": codes / (target_size or codebook_size),
        "utilisation": float((counts > 0).mean()),
        "dead_codes": int((counts == 0).sum()),
    }


def digit_usage(counts: np.ndarray, levels: tuple[int, ...]) -> float:
    """CVU of each digit of a mixed-radix index, averaged: what TokenBridge's tables show in place of the joint CVU.

    counts [K] of the joint index, levels the values that each digit has, least significant first.
    """
    grid = counts.reshape(levels[::-1])
    axes = range(grid.ndim)
    digits = [grid.sum(axis=tuple(a for a in axes if a != axis)) for axis in axes]
    return float(np.mean([perplexity(digit) / len(digit) for digit in digits]))
