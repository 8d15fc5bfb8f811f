"""VQ-VAE, arXiv 1711.00937, with options that keep the codebook in use. They can be combined freely:

l2: latents and codes on the unit sphere (VQ-VAE+; Yu et al., arXiv 2110.04627). replace_after: replaces unused codes
by latents. affine, alternating_lr: Huh et al., arXiv 2305.08842. gradient: rotation (arXiv 2410.06424).

Legend: z [N, d] latents, e [K, d] the searched codes, q [N] indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.distributed import from_first_rank, gather_rows, mean_across_ranks
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import CodebookQuantizer, check_codebook_shape, first_codes
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.straight_through import GRADIENTS

MOMENTUM = 0.9  # of the alternating step, as in vqtorch's example
REPLACE_NOISE = 0.01  # standard deviation in each dimension, relative to the new code's length, as in vqtorch
SMALLEST_LENGTH = 1e-6  # of a latent before normalisation: keeps the gradient finite at 0
SMALLEST_FACTOR = 1e-2  # new codes are divided by the affine factor, which can be close to 0


@dataclass
class VQVAEConfig:
    """gradient: straight_through or rotation. replace_after: steps without use until a code is replaced, 0 for never
    (vqtorch: 20).

    affine: how much faster a learned scale and shift of the whole codebook train than the codes, 0 for none (vqtorch:
    10). alternating_lr: learning rate of an SGD step on only the codes before each step of the model, 0 for none
    (vqtorch: 50). The optimizer then does not train the codes, and the paper sets the commitment weight to 0. sync_nu:
    share of the output's gradient that also goes to the chosen code, 0 for none (synchronized commitment; vqtorch's
    example: 1).
    """

    codebook_size: int = 1024
    dim: int = 64
    gradient: str = "straight_through"
    l2: bool = False
    replace_after: int = 0
    affine: float = 0.0
    alternating_lr: float = 0.0
    sync_nu: float = 0.0

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        if self.gradient not in GRADIENTS:
            raise ValueError(f"quantizer.gradient is {self.gradient!r}; choose one of: {', '.join(GRADIENTS)}")
        for name in ("replace_after", "affine", "alternating_lr", "sync_nu"):
            if getattr(self, name) < 0:
                raise ValueError(f"quantizer.{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if self.sync_nu and self.alternating_lr:
            raise ValueError(
                f"quantizer.sync_nu is {self.sync_nu} and alternating_lr {self.alternating_lr}; with alternating_lr "
                "the optimizer does not train the codes, so set one of them to 0"
            )


@QUANTIZERS.register("vq_vae")
class VQVAE(CodebookQuantizer):
    """A learned codebook, initialised by k-means over the first batch, with nearest-code search."""

    initialised: Tensor
    unused_steps: Tensor
    velocity: Tensor
    Config = VQVAEConfig
    default_loss_weights = {"codebook": 1.0, "commitment": 0.25}
    training_state = ("unused_steps", "velocity")

    def __init__(self, config: VQVAEConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        shape = (config.codebook_size, config.dim)
        self.embedding = nn.Parameter(torch.randn(shape), requires_grad=config.alternating_lr == 0)
        if config.affine:
            self.scale, self.shift = nn.Parameter(torch.zeros(config.dim)), nn.Parameter(torch.zeros(config.dim))
        if config.replace_after:
            self.register_buffer("unused_steps", torch.zeros(config.codebook_size, dtype=torch.int64))
        if config.alternating_lr:
            self.register_buffer("velocity", torch.zeros(shape))
        self.register_buffer("initialised", torch.tensor(False))
        self._replaced: Tensor | None = None  # rows replaced in the last step; the optimizer resets their moments

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        self._thaw()
        self._replaced = None
        z = self._to_search_space(z)
        if len(z) and not self.initialised:
            self.embedding.data.copy_(first_codes(z, self.codebook_size))
            self.initialised.fill_(True)
        q = nearest_codeword(z, self._effective(self.embedding))
        if self.config.replace_after and len(z):
            self._replace_unused(z.detach(), q)
        if self.config.alternating_lr and len(z):
            self._alternate(z.detach(), q)  # q stays the same for the model's step, as in vqtorch
        e_q = self._effective(self.embedding)[q]
        losses = {  # arXiv 1711.00937, eq. 3, as means over elements
            "codebook": mean_squared(z.detach() - e_q),
            "commitment": mean_squared(z - e_q.detach()),
        }
        z_q = GRADIENTS[self.config.gradient](z, e_q)
        if self.config.sync_nu:  # arXiv 2305.08842, section 4.3: adds only a gradient for the codes
            z_q = z_q + self.config.sync_nu * (e_q - e_q.detach())
        return QuantizerOutput(z_q, q, losses)

    def overwritten_rows(self) -> dict[str, Tensor]:
        return {} if self._replaced is None else {"embedding": self._replaced}

    def _encode(self, z: Tensor) -> Tensor:
        return super()._encode(self._to_search_space(z))

    def _live_codes(self) -> Tensor:
        if not self.initialised:
            raise CodebookMissing(
                "this VQ-VAE was never trained, so it has no codes: they start from the first training batch"
            )
        return self._effective(self.embedding)

    def _to_search_space(self, z: Tensor) -> Tensor:
        return normalize(z, dim=1, eps=SMALLEST_LENGTH) if self.config.l2 else z

    def _effective(self, embedding: Tensor) -> Tensor:
        """The searched codes: e = (1 + s a) * embedding + s b, on the unit sphere with l2."""
        if self.config.affine:
            embedding = (1 + self.config.affine * self.scale) * embedding + self.config.affine * self.shift
        return self._to_search_space(embedding)

    # -- updates of the codes without the optimizer -----------------------------------------------------------------

    @torch.no_grad()
    def _replace_unused(self, z: Tensor, q: Tensor) -> None:
        """Replaces codes that no rank used for `replace_after` steps by latents of this batch, with some noise."""
        counts = torch.bincount(q, minlength=self.codebook_size).float()
        self.unused_steps.add_(1)[mean_across_ranks(counts) > 0] = 0
        rows = (self.unused_steps >= self.config.replace_after).nonzero().flatten()
        if len(rows) == 0:
            return
        latents = gather_rows(z)
        # as in vqtorch, no latent is used twice before all have been used once
        order = torch.randperm(len(latents), device=z.device).repeat(1 + len(rows) // len(latents))
        new = latents[order[: len(rows)]]
        noise = REPLACE_NOISE * new.norm(dim=1, keepdim=True) * torch.randn_like(new)
        new = from_first_rank(new + noise)
        if self.config.affine:  # _effective applies the affine map to them, so invert it here
            factor = 1 + self.config.affine * self.scale
            new = (new - self.config.affine * self.shift) / factor.abs().clamp(min=SMALLEST_FACTOR).copysign(factor)
        self.embedding[rows] = new
        self.unused_steps[rows] = 0
        if self.config.alternating_lr:
            self.velocity[rows] = 0
        self._replaced = rows

    @torch.enable_grad()
    def _alternate(self, z: Tensor, q: Tensor) -> None:
        """One SGD step of only the codes on mean |e_q - z|^2 (arXiv 2305.08842, section 4.2)."""
        embedding = self.embedding.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(mean_squared(self._effective(embedding)[q] - z), embedding)
        with torch.no_grad():
            self.velocity.mul_(MOMENTUM).add_(mean_across_ranks(gradient))
            self.embedding.sub_(self.config.alternating_lr * self.velocity)
