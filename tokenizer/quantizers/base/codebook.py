"""Shared code of quantizers whose codebook is a list of vectors, searched for the nearest one."""

import torch
from torch import Tensor

from tokenizer.clustering.kmeans import kmeans
from tokenizer.clustering.latents import Latents
from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.distributed import from_first_rank, gather_rows
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.quantizer import Quantizer

INIT_TOKENS_PER_CODE = 64
INIT_ITERATIONS = 20


class CodebookQuantizer(Quantizer):
    """A subclass returns its codes during training from `_live_codes`; `fit` stores them as the frozen codebook.

    They are stored because computed codes (projected, normalised) can differ in the last bits between machines, and
    indices and the codebook's id depend on every bit.
    """

    table: Tensor  # the frozen codebook [K, dim], or [0, dim]; checkpoints and tokenizers have it under this name

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.codebook_size, self.dim, self.in_dim = codebook_size, dim, dim
        self.register_buffer("table", torch.zeros(0, dim))

    def _live_codes(self) -> Tensor:
        """[K, dim], with gradient if codes are learned. Raises CodebookMissing if training has not made any yet."""
        raise CodebookMissing(f"this {self.name} has no codebook yet; run `tokenmill codebook CONFIG.yaml` to make it")

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        super()._fit(latents, codebook_size, seed)
        self.table = self._live_codes().detach().clone()
        return []

    @property
    def codes(self) -> Tensor:
        """The frozen codes if there are any, otherwise the live ones: [K, dim]."""
        return self.table if len(self.table) else self._live_codes()

    def _thaw(self) -> None:
        """Drops the frozen codes. `_train_forward` calls this, since training changes the live ones."""
        if len(self.table):
            self.table = self.table.new_zeros(0, self.dim)

    def _encode(self, z: Tensor) -> Tensor:
        return nearest_codeword(z, self.codes)

    def _decode(self, indices: Tensor) -> Tensor:
        return self.codes[indices]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        saved = state_dict.get(f"{prefix}table")
        if saved is not None:  # `fit` decided on the number of codes
            self.table = self.table.new_zeros(saved.shape)
            self.codebook_size = len(saved) or self.codebook_size
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def first_codes(z: Tensor, codebook_size: int) -> Tensor:
    """Initial codes: k-means over the first batch of all ranks, the same on every rank. z [N, D] -> [K, D]."""
    tokens = gather_rows(z)[: INIT_TOKENS_PER_CODE * codebook_size]
    # broadcast although every rank computes it, because sums on a GPU have no fixed order
    return from_first_rank(kmeans(tokens, codebook_size, max_iterations=INIT_ITERATIONS).centroids.to(z))


def check_codebook_shape(codebook_size: int, dim: int) -> None:
    """Raises ValueError unless both are above 0."""
    if codebook_size < 1 or dim < 1:
        raise ValueError(f"quantizer.codebook_size is {codebook_size} and dim {dim}; both must be above 0")
