"""VQ-VAE with codes that are moving averages of their latents instead of parameters. arXiv 1711.00937, appendix A.1.

Legend: z [N, d] latents, e [K, d] codes, q [N] indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.distributed import from_first_rank, gather_rows, mean_across_ranks, world_size
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import CodebookQuantizer, check_codebook_shape, first_codes
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.straight_through import GRADIENTS

SMOOTHING = 1e-5  # Laplace smoothing: latents added to the count of every code
# Upper limit of revive_below, as a share of the latents per code in a batch. Without it a small batch would replace
# every code in every step. EnCodec's threshold is a share of .43: 2 of 64 * 75 / 1024
MAX_SHARE = 0.5


@dataclass
class EMAVQConfig:
    """decay: of the averages, per step; 0 uses only the current batch. gradient: straight_through or rotation.

    revive_below: a code is replaced by a random latent of the batch when its average number of latents per step, over
    all ranks, falls below this; 0 turns it off (EnCodec: 2). The threshold is at most N / 2K for a batch of N latents.
    """

    codebook_size: int = 1024
    dim: int = 64
    decay: float = 0.99
    gradient: str = "straight_through"
    revive_below: float = 0.0

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        if not 0 <= self.decay < 1:
            raise ValueError(f"quantizer.decay is {self.decay}; it must be 0 or more and below 1")
        if not self.revive_below >= 0:
            raise ValueError(f"quantizer.revive_below is {self.revive_below}; it must be 0 (off) or more")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"quantizer.gradient is {self.gradient!r}; choose one of: {', '.join(GRADIENTS)}")


@QUANTIZERS.register("ema_vq")
class EMAVQ(CodebookQuantizer):
    """Each code is an exponentially decaying mean of the latents that chose it. It starts from k-means over the first
    batch.

    Differs: a code that no latent of the batch chose does not move. With only Laplace smoothing it would drift to 0
    once its average count falls below the smoothing.

    Dead codes are revived as in EnCodec (arXiv 2210.13438, section 3.2). Differs: EnCodec's code
    (quantization/core_vq.py) writes the latent only into the codebook, where the averages of the same step overwrite
    it, so the code stays dead. We also set the averages, as if N / K latents per step had chosen the code.
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
        self._update(z.detach(), q)  # after the lookup, so this batch is quantized with the codes that it chose
        metrics = {"revived": self._revive(z.detach())} if self.config.revive_below else {}
        losses = {"commitment": mean_squared(z - e_q)}
        return QuantizerOutput(GRADIENTS[self.config.gradient](z, e_q), q, losses, metrics)

    def _live_codes(self) -> Tensor:
        if not self.initialised:
            raise CodebookMissing(
                "this ema_vq was never trained, so it has no codes: they start from the first training batch"
            )
        return self.embedding

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> None:
        """Codes from k-means; the averages start as if every step had been like this batch."""
        self.embedding.copy_(first_codes(z, self.codebook_size))
        counts, _ = self._totals(z, nearest_codeword(z, self.embedding))
        self.cluster_size.copy_(counts)
        self.embedding_sum.copy_(counts[:, None] * self.embedding)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, z: Tensor, q: Tensor) -> None:
        """arXiv 1711.00937, eq. 6 to 8, with the counts smoothed as in the authors' code."""
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
        """Replaces rarely used codes by latents of this batch, from any rank. Returns their number, float32 [].

        Each latent replaces at most one code. If there are too few latents, the other codes wait for the next step.
        """
        per_code = len(z) * world_size() / self.codebook_size
        threshold = min(self.config.revive_below, MAX_SHARE * per_code)
        # the same on all ranks, because the averages are equal there
        rows = (self.cluster_size < threshold).nonzero().flatten()
        if len(rows):
            latents = gather_rows(z)
            new = latents[torch.randperm(len(latents), device=z.device)[: len(rows)]]
            new, rows = from_first_rank(new), rows[: len(latents)]
            self.embedding[rows] = new
            self.cluster_size[rows] = per_code  # at the threshold, one step with few latents would replace it again
            self.embedding_sum[rows] = per_code * new
        return torch.tensor(float(len(rows)), device=z.device)

    def _totals(self, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """How many latents of all ranks chose each code [K], and their sums [K, d]."""
        totals = z.new_zeros(self.codebook_size, self.dim + 1)
        totals.index_add_(0, q, torch.cat([torch.ones_like(z[:, :1]), z], dim=1))
        totals = mean_across_ranks(totals) * world_size()
        return totals[:, 0], totals[:, 1:]
