"""Quality and usage of a frozen tokenizer over samples, batch by batch. Parts of a corpus add up."""

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
    """counts [Q, K]: how often each code was chosen. metrics: one value per sample. sums: of metrics of all samples."""

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
        rebuilt = tokenizer.decode(tokens, [sample.size for sample in samples])
        # measured on what a user would see or hear: whole pixels, without the padding
        x, x_hat = (tokenizer.modality.batch(group, factor=1).to(tokenizer.device) for group in (arrays, rebuilt))
        for name, values in quality(x, x_hat).items():
            self.metrics[name] += values.tolist()
        for name, (original, again) in quality.features(x, x_hat).items():
            if name not in self.sums:
                self.sums[name] = FrechetSums.empty(original.shape[1], original.device)
            self.sums[name].add(original, again)
        num_quantizers, codebook_size = self.counts.shape
        by_quantizer = np.concatenate([t.reshape(num_quantizers, -1) for t in tokens], axis=1)
        self.counts += count_codes(by_quantizer, codebook_size)
        flat = torch.cat([z.flatten(0, -2) for z in latents])
        shares = tokenizer.autoencoder.quantizer.code_shares(flat).reshape(num_quantizers, -1).double().cpu().numpy()
        self.batch_perplexities.append(float(np.mean([perplexity(row) for row in shares])))
        self.batch_tokens.append(by_quantizer.shape[1])
        self.sizes += [tokenizer.modality.processed_size(sample.size) for sample in samples]
        return rebuilt

    def merge(self, other: "Evaluation") -> None:
        self.counts += other.counts
        for name, values in other.metrics.items():
            self.metrics[name] += values
        self.batch_perplexities += other.batch_perplexities
        self.batch_tokens += other.batch_tokens
        self.sizes += other.sizes
        self.take_sums(other)

    def take_sums(self, other: "Evaluation") -> None:
        """Adds the sums of other to these and drops them there: they are large, and any order gives the same bits."""
        while other.sums:
            name, sums = other.sums.popitem()
            if name in self.sums:
                self.sums[name].merge(sums)
            else:
                self.sums[name] = sums

    @property
    def quality(self) -> list[str]:
        """Names of the metrics of quality, as `summary` has them."""
        return [*self.metrics, *self.sums]

    def summary(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Means over the samples where a metric is defined, usage of the codes, and the rate.

        `perplexity` is that of all tokens; `perplexity_per_batch` the mean over batches of `tokens_per_batch` tokens,
        for GM-VQ from q(c|x), as its paper reports it. With several quantizers, means over them.
        """
        quantizer = tokenizer.autoencoder.quantizer
        numbers: dict[str, Any] = {"num_samples": len(self.sizes)}
        for name, values in self.metrics.items():
            defined = [value for value in values if not math.isnan(value)]
            numbers[name] = float(np.mean(defined)) if defined else math.nan
            if len(defined) < len(values):  # else a mean could hide what has no value, as silence has no PESQ
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
