"""What the quantizers share whose codes are a table that is searched for the nearest one."""

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


class TableQuantizer(Quantizer):
    """A subclass says in `_live_codes` what the table is while it trains; `fit` freezes it into `table`.

    Frozen, so that a table that is computed (projected, normalised) has the same bits on every machine: indices
    and the codebook's id depend on them.
    """

    table: Tensor

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.codebook_size, self.dim, self.in_dim = codebook_size, dim, dim
        self.register_buffer("table", torch.zeros(0, dim))

    def _live_codes(self) -> Tensor:
        """[K, dim], with gradient where codes have one. Raises CodebookMissing where training has made none yet."""
        raise CodebookMissing(f"this {self.name} has no codebook yet; run `tokenmill codebook CONFIG.yaml` to make it")

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        super()._fit(latents, codebook_size, seed)
        self.table = self._live_codes().detach().clone()
        return []

    @property
    def codes(self) -> Tensor:
        """The frozen table, else the live one: [K, dim]."""
        return self.table if len(self.table) else self._live_codes()

    def _thaw(self) -> None:
        """Drops the frozen table: for `_train_forward` of a method whose codes train on and leave it behind."""
        if len(self.table):
            self.table = self.table.new_zeros(0, self.dim)

    def _encode(self, z: Tensor) -> Tensor:
        return nearest_codeword(z, self.codes)

    def _decode(self, indices: Tensor) -> Tensor:
        return self.codes[indices]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        saved = state_dict.get(f"{prefix}table")
        if saved is not None:  # the table has as many rows as `fit` gave it
            self.table = self.table.new_zeros(saved.shape)
            self.codebook_size = len(saved) or self.codebook_size
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def first_codes(z: Tensor, codebook_size: int) -> Tensor:
    """Codes to start from: k-means over the first batch of all ranks, the same codes on each. z [N, D] -> [K, D]."""
    tokens = gather_rows(z)[: INIT_TOKENS_PER_CODE * codebook_size]
    # sent around although every rank computes it: sums on a GPU need not come out in the same order
    return from_first_rank(kmeans(tokens, codebook_size, max_iterations=INIT_ITERATIONS).centroids.to(z))


def check_table(codebook_size: int, dim: int) -> None:
    """Raises ValueError on sizes that make no table."""
    if codebook_size < 1 or dim < 1:
        raise ValueError(f"quantizer.codebook_size is {codebook_size} and dim {dim}; both must be above 0")
