"""Reconstruction quality and codebook usage of a frozen tokenizer. Evaluations of shards can be merged."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokenizer.modalities.base import Decoded, Metrics
from tokenizer.modalities.image.frechet import FrechetSums
from tokenizer.tokenizer import Tokenizer
from tokenizer.usage import count_codes, digit_usage, perplexity, usage


@dataclass
class Evaluation:
    """counts [Q, K]: how often each code was chosen. metrics: a value per sample. sums: for Frechet distances."""

    counts: np.ndarray
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    batch_perplexities: list[float] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    sizes: list[dict[str, int]] = field(default_factory=list)
    sums: dict[str, FrechetSums] = field(default_factory=dict)

    @classmethod
    def empty(cls, tokenizer: Tokenizer) -> "Evaluation":
        quantizer = tokenizer.autoencoder.quantizer
        return cls(np.zeros((quantizer.num_quantizers, quantizer.codebook_size), dtype=np.int64))

    @torch.inference_mode()
    def add(self, tokenizer: Tokenizer, samples: list[Decoded], quality: Metrics) -> list[np.ndarray]:
        """Encodes, decodes and compares samples of one bucket; returns the reconstructions. Raises BadSample."""
        arrays = [sample.array for sample in samples]
        latents = tokenizer.latents(arrays)
        tokens = tokenizer.quantize(latents)
        reconstructions = tokenizer.decode(tokens, [sample.size for sample in samples])
        # compares the final output: 8-bit pixels, without padding
        batches = (tokenizer.modality.batch(batch, factor=1) for batch in (arrays, reconstructions))
        x, x_hat = (batch.to(tokenizer.device) for batch in batches)
        quality_of_each, features = quality(x, x_hat), quality.features(x, x_hat)
        flat = torch.cat([z.flatten(0, -2) for z in latents])
        code_shares = tokenizer.autoencoder.quantizer.code_shares(flat)
        # what can run out of memory is done: the caller may retry, and nothing must be added twice
        for name, values in quality_of_each.items():
            self.metrics[name] += values.tolist()
        for name, (original, reconstruction) in features.items():
            if name not in self.sums:
                self.sums[name] = FrechetSums.empty(original.shape[1], original.device)
            self.sums[name].add(original, reconstruction)
        num_quantizers, codebook_size = self.counts.shape
        by_quantizer = np.concatenate([t.reshape(num_quantizers, -1) for t in tokens], axis=1)
        self.counts += count_codes(by_quantizer, codebook_size)
        shares = code_shares.reshape(num_quantizers, -1).double().cpu().numpy()
        self.batch_perplexities.append(float(np.mean([perplexity(row) for row in shares])))
        self.batch_tokens.append(by_quantizer.shape[1])
        self.sizes += [tokenizer.modality.processed_size(sample.size) for sample in samples]
        return reconstructions

    def merge(self, other: "Evaluation") -> None:
        self.counts += other.counts
        for name, values in other.metrics.items():
            self.metrics[name] += values
        self.batch_perplexities += other.batch_perplexities
        self.batch_tokens += other.batch_tokens
        self.sizes += other.sizes
        self.take_sums(other)

    def take_sums(self, other: "Evaluation") -> None:
        """Moves the sums of other into this one. They are large; the result does not depend on the order."""
        while other.sums:
            name, sums = other.sums.popitem()
            if name in self.sums:
                self.sums[name].merge(sums)
            else:
                self.sums[name] = sums

    @property
    def quality(self) -> list[str]:
        """Names of the quality metrics in `summary`."""
        return [*self.metrics, *self.sums]

    def summary(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Means of the metrics over samples for which they are defined, codebook usage, and the bit rate.

        `perplexity` is over all tokens. `perplexity_per_batch` is the mean over batches of `tokens_per_batch` tokens;
        for GM-VQ it is computed from q(c|x), as in its paper. With several quantizers these are means over them.
        """
        quantizer = tokenizer.autoencoder.quantizer
        numbers: dict[str, Any] = {"num_samples": len(self.sizes)}
        for name, values in self.metrics.items():
            defined = [value for value in values if not math.isnan(value)]
            numbers[name] = float(np.mean(defined)) if defined else math.nan
            if len(defined) < len(values):  # shows how many samples the mean leaves out; silence has no PESQ
                numbers[f"{name}_undefined"] = len(values) - len(defined)
        for name, sums in self.sums.items():
            numbers |= sums.numbers(name)
        numbers |= usage(self.counts, quantizer.target_size)
        if quantizer.index_levels:
            numbers["cvu_per_dim"] = digit_usage(self.counts[0], quantizer.index_levels)
        numbers["perplexity_per_batch"] = float(np.mean(self.batch_perplexities))
        numbers["tokens_per_batch"] = float(np.mean(self.batch_tokens))
        bits = int(self.counts.sum()) * math.log2(quantizer.codebook_size)
        return numbers | tokenizer.modality.rate(bits, self.sizes)
