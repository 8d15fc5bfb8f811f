"""VQ-VAE: a learned codebook, nearest codeword, straight-through or rotated gradient. arXiv 1711.00937."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.distributed import gather_rows
from tokenizer.kmeans import kmeans
from tokenizer.neighbors import nearest_codeword
from tokenizer.quantizer import QUANTIZERS, Quantizer, QuantizerOutput, straight_through

INIT_TOKENS_PER_CODE = 64
INIT_ITERATIONS = 20
MIN_BISECTOR, MIN_LENGTH = 1e-3, 1e-12  # below, rounding would decide on the rotation


@dataclass
class VQVAEConfig:
    """gradient: straight_through, or rotation (Fifty et al., arXiv 2410.06424)."""

    codebook_size: int = 1024
    dim: int = 64
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        if self.codebook_size < 1 or self.dim < 1:
            raise ValueError(
                f"quantizer.codebook_size is {self.codebook_size} and dim {self.dim}; both must be above 0"
            )
        if self.gradient not in GRADIENTS:
            raise ValueError(f"quantizer.gradient is {self.gradient!r}; choose one of: {', '.join(GRADIENTS)}")


@QUANTIZERS.register("vq_vae")
class VQVAE(Quantizer):
    """The base form: k-means initialisation from the first batch, codebook and commitment loss, no EMA."""

    initialised: Tensor
    Config = VQVAEConfig
    default_loss_weights = {"codebook": 1.0, "commitment": 0.25}

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.codebook_size, self.dim, self.in_dim = config.codebook_size, config.dim, config.dim
        self.gradient = GRADIENTS[config.gradient]
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.dim))
        self.register_buffer("initialised", torch.tensor(False))

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        if not self.initialised and len(z):
            self._initialise(z)
        indices = nearest_codeword(z, self.codes)
        e = self.codes[indices]
        losses = {  # arXiv 1711.00937, eq. 3, as means over elements
            "codebook": _mean_squared(z.detach() - e),
            "commitment": _mean_squared(z - e.detach()),
        }
        return QuantizerOutput(self.gradient(z, e), indices, losses)

    @torch.no_grad()
    def _initialise(self, z: Tensor) -> None:
        """k-means over the first batch of all ranks: the same points and seed, so the same codes everywhere."""
        tokens = gather_rows(z)[: INIT_TOKENS_PER_CODE * self.codebook_size]
        found = kmeans(tokens, self.codebook_size, max_iterations=INIT_ITERATIONS)
        self.codes.copy_(found.centroids)
        self.initialised.fill_(True)

    def _encode(self, z: Tensor) -> Tensor:
        return nearest_codeword(z, self.codes)

    def _decode(self, indices: Tensor) -> Tensor:
        return self.codes[indices]


def rotate_to(z: Tensor, e: Tensor) -> Tensor:
    """e forward; backward the gradient is rotated and scaled as z was to become e.

    z, e [N, D] -> [N, D]. R = I - 2 r r^T + 2 e' z'^T with r the unit bisector (arXiv 2410.06424, section 4.2).
    Differs: straight-through where z is 0, or points away from e, and so no rotation is determined.
    """
    length_z = z.detach().norm(dim=1, keepdim=True).clamp(min=MIN_LENGTH)
    length_e = e.detach().norm(dim=1, keepdim=True)
    unit_z, unit_e = z.detach() / length_z, e.detach() / length_e.clamp(min=1e-12)
    middle = unit_z + unit_e
    determined = (middle.norm(dim=1, keepdim=True) > MIN_BISECTOR) & (length_z > MIN_LENGTH)
    bisector = nn.functional.normalize(middle, dim=1)
    reflected = z - 2 * (z * bisector).sum(dim=1, keepdim=True) * bisector
    rotated = reflected + 2 * (z * unit_z).sum(dim=1, keepdim=True) * unit_e
    return torch.where(determined, rotated * (length_e / length_z), straight_through(z, e))


def _mean_squared(x: Tensor) -> Tensor:
    return x.square().sum() / max(1, x.numel())  # finite for an empty batch


GRADIENTS = {"straight_through": straight_through, "rotation": rotate_to}
