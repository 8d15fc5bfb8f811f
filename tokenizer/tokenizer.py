"""The frozen artifact: preprocessing, encoder, codebook and decoder under one content hash.

Files of save_pretrained: tokenizer.json (settings and ids), model.safetensors (nets and projections),
codebook.safetensors (the quantizer's state and, up to 2^20 codes, the table of codes).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder, content_hash
from tokenizer.errors import TokenizerMismatch

SCHEMA_VERSION = 1
MAX_TABLE = 2**20  # a scalar quantizer may have more codes than memory; its codes are arithmetic anyway
INDEX_ORDER = "first dimension least significant"


class Tokenizer(LatentEncoder):
    """Bytes to tokens and back, always in eval mode and float32. Raises CodebookMissing without a codebook.

    settings: those of the Autoencoder; preprocessing: the fields of the modality's Config.
    """

    def __init__(self, autoencoder: Autoencoder, preprocessing: dict[str, Any]):
        super().__init__(autoencoder, preprocessing)
        self.codebook_size = autoencoder.quantizer.codebook_size
        self._codebook_state = self._make_codebook_state()
        self.codebook_id = content_hash(autoencoder.settings["quantizer"], self._codebook_state)
        self.id = content_hash({"settings": self._identity(), "codebook_id": self.codebook_id}, self.net_state())

    @torch.inference_mode()
    def encode(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Tokens of arrays of one bucket: int64, in the shape of the token grid. Raises BadSample on NaN latents."""
        return self.quantize(self.latents(arrays))

    def quantize(self, latents: list[Tensor]) -> list[np.ndarray]:
        """Tokens of each sample's latents [..., in_dim]: int64, with a leading axis of quantizers if several."""
        indices = self.autoencoder.quantizer.encode(torch.cat([z.flatten(0, -2) for z in latents])).cpu()
        grids = [z.shape[:-1] for z in latents]
        parts = indices.split([math.prod(grid) for grid in grids])
        tokens = [part.reshape(*grid, *part.shape[1:]) for part, grid in zip(parts, grids, strict=True)]
        return [(t.movedim(-1, 0) if self.autoencoder.quantizer.num_quantizers > 1 else t).numpy() for t in tokens]

    @torch.inference_mode()
    def decode(self, tokens: list[np.ndarray], sizes: list[dict[str, int]]) -> list[np.ndarray]:
        """Arrays of the sizes that `read` gave, from tokens of one bucket. Raises ValueError on a token >= K."""
        z_q, mask = _stacked([self._codes(t) for t in tokens])
        x = self.autoencoder.reconstruct(z_q, mask)
        return self.modality.unbatch(x, [self.modality.processed_size(size) for size in sizes])

    def _codes(self, tokens: np.ndarray) -> Tensor:
        """[..., dim] on the device."""
        indices = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(
                f"tokens lie in {int(indices.min())}..{int(indices.max())}, not 0..{self.codebook_size - 1}"
            )
        if self.autoencoder.quantizer.num_quantizers > 1:
            indices = indices.movedim(0, -1)
        return self.autoencoder.quantizer.decode(indices)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.net_state(), folder / "model.safetensors")
        save_file(self._codebook_state, folder / "codebook.safetensors")
        ids = {"tokenizer_id": self.id, "codebook_id": self.codebook_id, "codebook_size": self.codebook_size}
        about = {"schema_version": SCHEMA_VERSION, **ids, "index_order": INDEX_ORDER, **self._identity()}
        (folder / "tokenizer.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Tokenizer":
        """Raises TokenizerMismatch if the files are not those that tokenizer.json names."""
        folder = Path(folder)
        about = json.loads((folder / "tokenizer.json").read_text())
        autoencoder = Autoencoder(about["model"])
        codebook = load_file(folder / "codebook.safetensors")
        table = codebook.pop("codebook", None)
        state = {f"quantizer.{name}": tensor for name, tensor in codebook.items()}
        try:
            autoencoder.load_inference_state(load_file(folder / "model.safetensors") | state)
        except RuntimeError as error:
            raise TokenizerMismatch(
                f"{folder}: {error}; another version of Tokenmill made it: make it again with `tokenmill codebook`"
            ) from error
        tokenizer = cls(autoencoder, about["preprocessing"])
        same_table = table is None or torch.equal(table, tokenizer._codebook_state["codebook"])
        if tokenizer.id != about["tokenizer_id"] or not same_table:
            raise TokenizerMismatch(
                f"{folder} says tokenizer {about['tokenizer_id']}, but its files are not those of that tokenizer; "
                "one was changed or mixed up: fetch the folder anew, or make it again with `tokenmill codebook`"
            )
        tokenizer.to(device)
        return tokenizer

    def _identity(self) -> dict[str, Any]:
        return {"model": self.autoencoder.settings, "preprocessing": self.preprocessing}

    def _make_codebook_state(self) -> dict[str, Tensor]:
        quantizer = self.autoencoder.quantizer
        state = {
            name.removeprefix("quantizer."): tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.autoencoder.inference_state().items()
            if name.startswith("quantizer.")
        }
        if self.codebook_size <= MAX_TABLE:
            state["codebook"] = quantizer.codebook.detach().cpu().contiguous().clone()
        else:
            one = torch.zeros(1, quantizer.num_quantizers, dtype=torch.int64, device=self.device)
            quantizer.decode(one)  # raises CodebookMissing here
        return state


def _stacked(codes: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[B, ..., dim]; sequences [F, dim] of several lengths are padded, with the mask [B, 1, F] of what is real."""
    if len({part.shape for part in codes}) == 1:
        return torch.stack(codes), None
    lengths = torch.tensor([len(part) for part in codes], device=codes[0].device)
    padded = nn.utils.rnn.pad_sequence(codes, batch_first=True)
    return padded, (torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None])[:, None]
