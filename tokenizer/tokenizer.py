"""The frozen tokenizer: preprocessing, encoder, codebook and decoder, identified by a content hash.

save_pretrained writes tokenizer.json (settings and ids), model.safetensors (nets and projections) and
codebook.safetensors (the quantizer's state and, up to 2^20 codes, the codebook itself).
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
from tokenizer.errors import TokenizerMismatch, UnsupportedModel, naming_damage
from tokenizer.inputs import as_array, batches, check_preprocessed, is_one, read_input
from tokenizer.modalities.base import described

SCHEMA_VERSION = 1
MAX_SAVED_CODES = 2**20  # a scalar quantizer can have more codes than fit in memory; it computes them anyway
INDEX_ORDER = "first dimension least significant"


class Tokenizer(LatentEncoder):
    """Encodes arrays to tokens and decodes them, in eval mode and float32. Raises CodebookMissing without a codebook.

    settings: those of the Autoencoder; preprocessing: the fields of the modality's Config.
    """

    def __init__(self, autoencoder: Autoencoder, preprocessing: dict[str, Any]):
        super().__init__(autoencoder, preprocessing)
        self.codebook_size = autoencoder.quantizer.codebook_size
        self._codebook_state = self._make_codebook_state()
        self.codebook_id = content_hash(autoencoder.settings["quantizer"], self._codebook_state)
        self.id = content_hash({"settings": self._identity(), "codebook_id": self.codebook_id}, self.net_state())

    def __repr__(self) -> str:
        quantizer = self.autoencoder.quantizer
        layers = f", {quantizer.num_quantizers} quantizers" if quantizer.num_quantizers > 1 else ""
        return (
            f"Tokenizer({self.modality.name}, {self.autoencoder.settings['quantizer']['name']}{layers}, "
            f"K={self.codebook_size}, factor={self.autoencoder.factor}, id={self.id}, device={self.device})"
        )

    def encode(
        self,
        inputs: Any,
        *,
        preprocessed: bool = False,
        value_range: tuple[float, float] | None = None,
        layout: str = "",
        sample_rate: int | None = None,
    ) -> Any:
        """Tokens of one sample, int64 in the shape of the token grid, or a list of them for several samples.

        inputs: a sample is the bytes of a file, a path, a PIL image, or an array or tensor: of an image [H, W],
        [H, W, C] or [C, H, W], uint8, or float with its value_range such as (0, 1); of audio [T] or [C, T], int16, or
        float in -1..1, with its sample_rate in Hz. A list, a tuple, or an array with one more dimension holds several
        samples, also of different sizes. layout: HWC or CHW, if the shape does not show which it is.
        The tokenizer's preprocessing is applied, unless preprocessed is true: then each sample is an array as it comes
        out of it, uint8 [H, W, 3] or float32 [T, 1].
        The tokens are those that `tokenmill tokenize` makes of the same file, or of a lossless file of the array.

        Raises BadSample for a file that cannot be read, and ValueError for an array that could mean several things.
        """
        one = is_one(inputs, self.modality.num_dims)
        stated = {"value_range": value_range, "layout": layout, "sample_rate": sample_rate}
        arrays = []
        for number, value in enumerate([inputs] if one else inputs):
            try:
                if preprocessed:
                    arrays.append(check_preprocessed(value, self.modality))
                else:
                    arrays.append(read_input(value, self.modality, self.read_file, stated).array)
            except ValueError as error:  # BadSample too
                raise type(error)(f"{error}" if one else f"input {number}: {error}") from error
        tokens: dict[int, np.ndarray] = {}
        for batch in batches(arrays, self.modality):
            tokens.update(zip(batch, self.encode_batch([arrays[i] for i in batch]), strict=True))
        return tokens[0] if one else [tokens[i] for i in range(len(arrays))]

    __call__ = encode

    @staticmethod
    def read_file(place: str) -> bytes:
        """The content of a file. `tokenmill.Tokenizer` also reads URLs."""
        return Path(place).read_bytes()

    @torch.inference_mode()
    def encode_batch(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Tokens of arrays of one bucket: int64, in the shape of the token grid. Raises BadSample for NaN latents."""
        return self.quantize(self.latents(arrays))

    def quantize(self, latents: list[Tensor]) -> list[np.ndarray]:
        """Tokens of each sample's latents [..., in_dim]: int64 [...], or [Q, ...] if there are Q > 1 quantizers."""
        if self.autoencoder.net.one_by_one and len(latents) > 1:
            return [tokens for z in latents for tokens in self.quantize([z])]
        indices = self.autoencoder.quantizer.encode(torch.cat([z.flatten(0, -2) for z in latents])).cpu()
        grids = [z.shape[:-1] for z in latents]
        by_sample = indices.split([math.prod(grid) for grid in grids])
        tokens = [t.reshape(*grid, *t.shape[1:]) for t, grid in zip(by_sample, grids, strict=True)]
        return [(t.movedim(-1, 0) if self.autoencoder.quantizer.num_quantizers > 1 else t).numpy() for t in tokens]

    def decode(self, tokens: Any, sizes: Any = None) -> Any:
        """The sample of one grid of tokens: uint8 [H, W, 3] or float32 [T, 1]; or a list of them for several grids.

        tokens: integers in the shape that `encode` gives, as an array or tensor; several as a list, or as an array with
        one more dimension. sizes: the size of each sample before preprocessing, as in the columns of token shards;
        without it the samples have the size of the grid times the factor. Raises ValueError for tokens that are none
        of this tokenizer, and for another number of dimensions.
        """
        self.require_decoder()
        quantizer = self.autoencoder.quantizer
        num_dims = self.modality.num_dims - 1 + (quantizer.num_quantizers > 1)
        one = is_one(tokens, num_dims)
        grids = [np.asarray(as_array(t)) for t in ([tokens] if one else tokens)]
        for grid in grids:
            self._check_tokens(grid, num_dims)
        if sizes is not None:
            sizes = [sizes] if one and isinstance(sizes, dict) else list(sizes)
        if sizes is not None and len(sizes) != len(grids):
            raise ValueError(f"{len(sizes)} sizes for {len(grids)} grids of tokens; give one for each")
        samples: dict[int, np.ndarray] = {}
        for batch in self._grids_together(grids):
            wanted = [self._decoded_size(grids[i], sizes and sizes[i]) for i in batch]
            samples.update(zip(batch, self._decode_batch([grids[i] for i in batch], wanted), strict=True))
        return samples[0] if one else [samples[i] for i in range(len(grids))]

    def require_decoder(self) -> None:
        """Raises UnsupportedModel if an imported tokenizer only encodes."""
        if not self.autoencoder.net.decodes:
            raise UnsupportedModel(
                f"this tokenizer only encodes: its library has no decoder of {self.autoencoder.settings['net']['name']}"
            )

    def _check_tokens(self, grid: np.ndarray, num_dims: int) -> None:
        num_quantizers = self.autoencoder.quantizer.num_quantizers
        if grid.ndim != num_dims or not np.issubdtype(grid.dtype, np.integer) or grid.size == 0:
            raise ValueError(
                f"tokens are integers with {num_dims} dimensions, and not empty; this array has {described(grid)}"
            )
        if num_quantizers > 1 and len(grid) != num_quantizers:
            raise ValueError(
                f"the first dimension is that of {num_quantizers} quantizers; this array has {described(grid)}"
            )
        low, high = int(grid.min()), int(grid.max())
        if not 0 <= low <= high < self.codebook_size:
            raise ValueError(f"tokens are in {low}..{high}, but this tokenizer has 0..{self.codebook_size - 1}")

    def _grids_together(self, grids: list[np.ndarray]) -> list[list[int]]:
        """Numbers of grids that fit into one batch: grids of images with the same shape, all sequences."""
        if self.autoencoder.net.one_by_one:
            return [[number] for number in range(len(grids))]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, grid in enumerate(grids):
            by_shape.setdefault(grid.shape if self.modality.num_dims > 2 else (), []).append(number)
        return list(by_shape.values())

    def _decoded_size(self, grid: np.ndarray, size: dict[str, int] | None) -> dict[str, int]:
        factor = self.autoencoder.factor
        shape = grid.shape[1:] if self.autoencoder.quantizer.num_quantizers > 1 else grid.shape
        whole = self.modality.size_of_grid(shape, factor)
        if size is None:
            return whole
        if missing := set(self.modality.size_columns) - size.keys():
            raise ValueError(f"sizes: {size} lacks {', '.join(sorted(missing))}")
        wanted = self.modality.processed_size(size)
        if any(name != "sample_rate" and not 0 <= whole[name] - wanted[name] < factor for name in whole):
            raise ValueError(f"sizes: {size} does not belong to these tokens, whose grid is {shape}, times {factor}")
        return wanted

    @torch.inference_mode()
    def _decode_batch(self, tokens: list[np.ndarray], sizes: list[dict[str, int]]) -> list[np.ndarray]:
        z_q, mask = _stacked([self._codes(t) for t in tokens])
        return self.modality.unbatch(self.autoencoder.reconstruct(z_q, mask), sizes)

    def _codes(self, tokens: np.ndarray) -> Tensor:
        """The codes of tokens: [..., dim] on the device."""
        indices = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
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
        """Raises FileNotFoundError if a file is missing, and TokenizerMismatch if one is damaged, written by a newer
        version, or does not have the ids in tokenizer.json."""
        folder = Path(folder)
        with naming_damage(folder / "tokenizer.json"):
            about = _read_about(folder / "tokenizer.json")
            autoencoder = Autoencoder(about["model"])
        with naming_damage(folder / "codebook.safetensors"):
            codebook = load_file(folder / "codebook.safetensors")
        with naming_damage(folder / "model.safetensors"):
            weights = load_file(folder / "model.safetensors")
        saved_codes = codebook.pop("codebook", None)
        state = {f"quantizer.{name}": tensor for name, tensor in codebook.items()}
        try:
            autoencoder.load_inference_state(weights | state)
        except RuntimeError as error:
            raise TokenizerMismatch(
                f"{folder}: {error}; another version of Tokenmill wrote it: make it again with `tokenmill codebook`"
            ) from error
        with naming_damage(folder / "tokenizer.json"):
            tokenizer = cls(autoencoder, about["preprocessing"])
        if tokenizer.id != about["tokenizer_id"] or not tokenizer._has_codes(saved_codes):
            raise TokenizerMismatch(
                f"{folder}/tokenizer.json has id {about['tokenizer_id']}, but the other files do not match it; "
                "a file was changed or mixed up: copy the folder again, or make it with `tokenmill codebook`"
            )
        tokenizer.to(device)
        return tokenizer

    def _has_codes(self, saved: Tensor | None) -> bool:
        """Whether the codes of codebook.safetensors are those that its state gives."""
        codes = self._codebook_state.get("codebook")
        if saved is None or codes is None:
            return saved is None
        return saved.dtype == codes.dtype and torch.equal(saved, codes)

    def _identity(self) -> dict[str, Any]:
        return {"model": self.autoencoder.settings, "preprocessing": self.preprocessing}

    def _make_codebook_state(self) -> dict[str, Tensor]:
        quantizer = self.autoencoder.quantizer
        state = {
            name.removeprefix("quantizer."): tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.autoencoder.inference_state().items()
            if name.startswith("quantizer.")
        }
        if self.codebook_size <= MAX_SAVED_CODES:
            state["codebook"] = quantizer.codebook.detach().cpu().contiguous().clone()
        else:
            index = torch.zeros(1, quantizer.num_quantizers, dtype=torch.int64, device=self.device)
            quantizer.decode(index)  # raises CodebookMissing if there is none
        return state


def _read_about(path: Path) -> dict[str, Any]:
    """tokenizer.json. Raises TokenizerMismatch for a newer schema, and other errors if it is damaged."""
    about = json.loads(path.read_text())
    version = about["schema_version"]
    if type(version) is int and version > SCHEMA_VERSION:
        raise TokenizerMismatch(
            f"{path}: schema_version is {version}; this version of tokenmill reads up to {SCHEMA_VERSION}; upgrade "
            "tokenmill"
        )
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, not {SCHEMA_VERSION}")
    if missing := {"model", "preprocessing", "tokenizer_id"} - about.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    return about


def _stacked(codes: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks to [B, ..., dim].

    Sequences [F, dim] of unequal lengths are padded; then the mask [B, 1, F] is not None.
    """
    if len({sample.shape for sample in codes}) == 1:
        return torch.stack(codes), None
    lengths = torch.tensor([len(sample) for sample in codes], device=codes[0].device)
    padded = nn.utils.rnn.pad_sequence(codes, batch_first=True)
    return padded, (torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None])[:, None]
