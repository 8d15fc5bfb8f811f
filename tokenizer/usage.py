"""Codebook usage: how many codes a corpus uses, how evenly, and the error of the codes.

counts [K]: how often each code was chosen, or its share.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tokenizer.clustering.latents import LatentBatch
from tokenizer.quantizers.base.quantizer import Quantizer


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy, in codes: from 1 (only one code is used) to K (all are used equally). 0 without tokens."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def count_codes(tokens: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each code of each of Q quantizers was chosen: tokens [Q, ...] -> [Q, K] int64."""
    return np.stack([np.bincount(indices.ravel(), minlength=codebook_size) for indices in tokens])


def usage(counts: np.ndarray, target_size: int | None = None) -> dict[str, float]:
    """CVU (arXiv 2602.17133, eq. 19), perplexity and utilisation of a codebook.

    counts [K] int64; or [Q, K] for Q quantizers, which gives means over them. target_size: the configured number of
    codes, from which a scalar quantizer's K can differ (1000 for 1024); "cvu" is relative to K and "cvu_target" to
    target_size. Few tokens bias the perplexity: 16,384 uniform tokens over 1024 codes give 992, and 1,024 tokens 577.
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
    """Mean CVU of the digits of a mixed-radix index; TokenBridge's tables show it instead of the CVU of whole codes.

    counts [K] of the indices; levels: the number of values of each digit, least significant first.
    """
    grid = counts.reshape(levels[::-1])
    axes = range(grid.ndim)
    digits = [grid.sum(axis=tuple(a for a in axes if a != axis)) for axis in axes]
    return float(np.mean([perplexity(digit) / len(digit) for digit in digits]))


@dataclass
class QuantizationSums:
    """counts [Q, K] int64: how often each code was chosen. squared_error: summed over latents and channels."""

    counts: np.ndarray
    squared_error: float

    def __add__(self, other: "QuantizationSums") -> "QuantizationSums":
        return QuantizationSums(self.counts + other.counts, self.squared_error + other.squared_error)


@torch.no_grad()
def quantization_sums(batch: LatentBatch, quantizer: Quantizer) -> QuantizationSums:
    """Quantizes a batch and sums up usage and error. The sums of batches add up to those of a corpus.

    If the quantizer reads more channels than it outputs (weights, variances), the latents proper come first.
    """
    quantizer = quantizer.to(batch.latents.device)
    indices = quantizer.encode(batch.latents)
    counts = count_codes(indices.reshape(len(indices), -1).T.cpu().numpy(), quantizer.codebook_size)
    error = quantizer.decode(indices) - batch.latents[:, : quantizer.dim]
    return QuantizationSums(counts, float(error.double().square().sum()))
