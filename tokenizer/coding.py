"""What codes make of latents, summed up part by part."""

from dataclasses import dataclass

import numpy as np
import torch

from tokenizer.clustering.latents import Part
from tokenizer.quantizers.base.quantizer import Quantizer
from tokenizer.usage import count_codes


@dataclass
class Coding:
    """counts [Q, K] int64: how often each code was chosen. squared_error: summed over latents and channels."""

    counts: np.ndarray
    squared_error: float

    def __add__(self, other: "Coding") -> "Coding":
        return Coding(self.counts + other.counts, self.squared_error + other.squared_error)


@torch.no_grad()
def coding(part: Part, quantizer: Quantizer) -> Coding:
    """Of the channels that the quantizer hands on; one that reads more (weights, variances) has its latents first."""
    quantizer = quantizer.to(part.latents.device)
    indices = quantizer.encode(part.latents)
    counts = count_codes(indices.reshape(len(indices), -1).T.cpu().numpy(), quantizer.codebook_size)
    error = quantizer.decode(indices) - part.latents[:, : quantizer.dim]
    return Coding(counts, float(error.double().square().sum()))
