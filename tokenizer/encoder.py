"""Preprocessing and encoder: bytes to arrays, arrays to latents. Needs no codebook."""

import hashlib
import json
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder
from tokenizer.errors import BadSample
from tokenizer.modalities.base import build_modality, identity_of


class LatentEncoder:
    """Frozen nets in eval mode and float32. preprocessing: the fields of the modality's Config."""

    def __init__(self, autoencoder: Autoencoder, preprocessing: dict[str, Any]):
        self.autoencoder = autoencoder.eval().requires_grad_(False).float()
        modality = autoencoder.settings["modality"]
        self.preprocessing = identity_of(modality, preprocessing)
        self.modality = build_modality(modality, preprocessing)

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves the nets. Uses channels_last, which is faster for convolutions on CPU and GPU."""
        self.autoencoder.to(device)
        if all(weight.ndim < 5 for weight in self.autoencoder.parameters()):
            self.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def encoder_id(self) -> str:
        """Hash of everything that determines the latents: nets, projections and preprocessing, but not the codebook."""
        model = {name: value for name, value in self.autoencoder.settings.items() if name != "quantizer"}
        return content_hash({"model": model, "preprocessing": self.preprocessing}, self.net_state())

    def net_state(self) -> dict[str, Tensor]:
        """The weights of nets and projections."""
        state = self.autoencoder.inference_state()
        return {name: t.detach().cpu().contiguous() for name, t in state.items() if not name.startswith("quantizer.")}

    def encode_batch(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Like `latents`, but as arrays on the CPU."""
        return [z.cpu().numpy() for z in self.latents(arrays)]

    @torch.inference_mode()
    def latents(self, arrays: list[np.ndarray]) -> list[Tensor]:
        """The quantizer's input for each array of one bucket: [..., in_dim] float32. Raises BadSample for NaN."""
        net = self.autoencoder.net
        if net.one_by_one and len(arrays) > 1:
            return [z for array in arrays for z in self.latents([array])]
        batch = self.modality.batch(arrays, 1 if net.pads else net.factor)
        x = batch.x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch.x
        mask = None if batch.mask is None else batch.mask.to(self.device)
        z = self.autoencoder.latents(x, mask)
        if not torch.isfinite(z).all():
            raise BadSample("the encoder output is NaN or infinite")
        return list(z) if mask is None or net.one_by_one else [row[real[0]] for row, real in zip(z, mask, strict=True)]


def content_hash(settings: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """16 hex digits: a hash of settings and tensors that does not depend on their order or device."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
