"""Codebook usage: how many of the codes a corpus uses, and how evenly.

counts [K] int64: how often each code was chosen.
"""

import numpy as np


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the codes, in codes: 1 (one code only) .. K (all alike). 0 without any token."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def usage(counts: np.ndarray, target_size: int | None = None) -> dict[str, float]:
    """CVU (arXiv 2602.17133, eq. 19) by the actual and the target number of codes, perplexity, utilisation.

    A scalar quantizer has another number of codes than it was asked for (1000 for 1024): both CVUs are given.
    Mind the finite sample: 16,384 uniform tokens over 1024 codes read 992, and 1,024 tokens 577.
    """
    codebook_size = len(counts)
    codes = perplexity(counts)
    return {
        "num_tokens": int(counts.sum()),
        "codebook_size": codebook_size,
        "target_size": target_size or codebook_size,
        "perplexity": codes,
        "cvu": codes / codebook_size,
        "cvu_target": codes / (target_size or codebook_size),
        "utilisation": float((counts > 0).mean()),
        "dead_codes": int((counts == 0).sum()),
    }
