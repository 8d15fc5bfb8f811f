"""VQ-VAE whose codes are moving averages of their latents, arXiv 1711.00937, appendix A.1: no optimizer trains them.

Legend: z [N, d] latents, e [K, d] codes, q [N] indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.distributed import from_first_rank, gather_rows, mean_across_ranks, world_size
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import TableQuantizer, check_table, first_codes
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.straight_through import GRADIENTS

SMOOTHING = 1e-5  # latents that every code is taken to have, besides its own (Laplace)
# The largest threshold, as a share of a batch's latents per code: without it, a small batch would replace every code in
# every step. EnCodec's own threshold is a share of .43: 2 of 64 * 75 / 1024
LARGEST_SHARE = 0.5


@dataclass
class EMAVQConfig:
    """decay: of the averages, per step; 0 takes the batch alone. gradient: straight_through or rotation.

    revive_below: a code whose average number of latents per step, of all ranks, falls below it starts anew from a
    random latent of the batch; 0 for never (EnCodec: 2). Where N / 2K is less, of N latents, that is the threshold.
    """

    codebook_size: int = 1024
    dim: int = 64
    decay: float = 0.99
    gradient: str = "straight_through"
    revive_below: float = 0.0

    def __post_init__(self) -> None:
        check_table(self.codebook_size, self.dim)
        if not 0 <= self.decay < 1:
            raise ValueError(f"quantizer.decay is {self.decay}; it must lie in 0..1, below 1")
        if not self.revive_below >= 0:
            raise ValueError(f"quantizer.revive_below is {self.revive_below}; it must be 0 (off) or more")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"quantizer.gradient is {self.gradient!r}; choose one of: {', '.join(GRADIENTS)}")


@QUANTIZERS.register("ema_vq")
class EMAVQ(TableQuantizer):
    """Each code is the mean of the latents that chose it, those of old batches counting less and less.

    Differs: a code that no latent of the batch chose stays exactly where it is. With Laplace smoothing alone it would
    drift to 0 as its average count falls below the smoothing. Starts from k-means over the first batch.

    Reviving codes: as in EnCodec (arXiv 2210.13438, section 3.2). Differs: its code (quantization/core_vq.py) puts the
    latent into the table alone, which the averages of the same step overwrite, so that the code stays dead. Here the
    averages are set too, as if the latent had been chosen N / K times per step.
    """

    embedding: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    initialised: Tensor
    Config = EMAVQConfig
    default_loss_weights = {"commitment": 0.25}
    training_state = ("cluster_size", "embedding_sum")

    def __init__(self, config: EMAVQConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        shape = (config.codebook_size, config.dim)
        self.register_buffer("embedding", torch.zeros(shape))
        self.register_buffer("cluster_size", torch.zeros(config.codebook_size))
        self.register_buffer("embedding_sum", torch.zeros(shape))
        self.register_buffer("initialised", torch.tensor(False))

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        self._thaw()
        if len(z) and not self.initialised:
            self._initialise(z.detach())
        q = nearest_codeword(z, self.embedding)
        e_q = self.embedding[q]
        self._update(z.detach(), q)  # after the lookup: this batch still sees the codes that it chose
        metrics = {"revived": self._revive(z.detach())} if self.config.revive_below else {}
        losses = {"commitment": mean_squared(z - e_q)}
        return QuantizerOutput(GRADIENTS[self.config.gradient](z, e_q), q, losses, metrics)

    def _live_codes(self) -> Tensor:
        if not self.initialised:
            raise CodebookMissing("this ema_vq was never trained: its codes start from the first batch of training")
        return self.embedding

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> None:
        """k-means codes, as heavy as the latents of the batch that are theirs: the averages start in balance."""
        self.embedding.copy_(first_codes(z, self.codebook_size))
        counts, _ = self._totals(z, nearest_codeword(z, self.embedding))
        self.cluster_size.copy_(counts)
        self.embedding_sum.copy_(counts[:, None] * self.embedding)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, z: Tensor, q: Tensor) -> None:
        """arXiv 1711.00937, eq. 6 to 8, the counts smoothed as in its authors' code."""
        counts, sums = self._totals(z, q)
        decay = self.config.decay
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embedding_sum.mul_(decay).add_(sums, alpha=1 - decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total
        means = self.embedding_sum / smoothed[:, None]
        self.embedding.copy_(torch.where(counts[:, None] > 0, means, self.embedding))

    @torch.no_grad()
    def _revive(self, z: Tensor) -> Tensor:
        """Codes in too little use become latents of this batch, of any rank; returns how many, float32 [].

        Never two codes from one latent: where there are more codes than latents, the others wait for the next step.
        """
        fair = len(z) * world_size() / self.codebook_size
        threshold = min(self.config.revive_below, LARGEST_SHARE * fair)
        # the same on all ranks, since the averages are: of sums of whole numbers
        rows = (self.cluster_size < threshold).nonzero().flatten()
        if len(rows):
            everyone = gather_rows(z)
            new = everyone[torch.randperm(len(everyone), device=z.device)[: len(rows)]]
            new, rows = from_first_rank(new), rows[: len(everyone)]
            self.embedding[rows] = new
            self.cluster_size[rows] = fair  # at the threshold itself, one step of little use would end it again
            self.embedding_sum[rows] = fair * new
        return torch.tensor(float(len(rows)), device=z.device)

    def _totals(self, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """How many latents of all ranks chose each code [K], and their sums [K, d]."""
        own = z.new_zeros(self.codebook_size, self.dim + 1)
        own.index_add_(0, q, torch.cat([torch.ones_like(z[:, :1]), z], dim=1))
        everyone = mean_across_ranks(own) * world_size()
        return everyone[:, 0], everyone[:, 1:]
