"""Encoder -> projection -> quantizer -> projection -> decoder.

Legend: x [B, channels, ...] as the modality makes it, z [B, ..., in_dim] channel-last latents.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.nets.base.net import build_net
from tokenizer.quantizers.base.quantizer import QuantizerOutput, build_quantizer


@dataclass
class AutoencoderOutput:
    x_hat: Tensor
    z: Tensor
    quantized: QuantizerOutput


class Autoencoder(nn.Module):
    """settings: {"modality": name, "net": {"name", ...}, "quantizer": {"name", ...}}, all that rebuilds it."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = settings
        self.net = build_net(settings["net"])
        self.quantizer = build_quantizer(settings["quantizer"])
        self.project_in = nn.Linear(self.net.channels, self.quantizer.in_dim)
        self.project_out = nn.Linear(self.quantizer.dim, self.net.channels)

    @property
    def factor(self) -> int:
        """Input units (pixels, waveform samples) per token and dimension."""
        return self.net.factor

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """For training; a frozen tokenizer takes `latents` and `reconstruct`."""
        z = self.project_in(self.net.encode(x).movedim(1, -1))
        quantized = self.quantizer(z)
        return AutoencoderOutput(self.net.decode(self.project_out(quantized.z_q).movedim(-1, 1)), z, quantized)

    def latents(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the quantizer is given: [B, channels, ...] -> [B, ..., in_dim]. mask [B, 1, F]: the real frames."""
        return self.project_in(self.net.encode_frozen(x, mask).movedim(1, -1))

    def reconstruct(self, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, ..., dim] -> [B, channels, ...]."""
        return self.net.decode_frozen(self.project_out(z_q).movedim(-1, 1), mask)

    def change_fit(self, settings: dict[str, Any]) -> None:
        """Sets what `quantizer.fit` alone reads, after training. Raises ValueError on anything else."""
        quantizer = self.quantizer
        for name in settings:
            if name not in quantizer.fit_settings:
                allowed = ", ".join(quantizer.fit_settings) or "nothing"
                raise ValueError(f"{name} of {quantizer.name} cannot change after training; {allowed} can")
        quantizer.config = dataclasses.replace(quantizer.config, **settings)  # type: ignore[type-var]
        self.settings["quantizer"] |= settings

    def save(self, folder: str | Path) -> None:
        """settings and inference state to folder/config.json and folder/model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.inference_state().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Autoencoder":
        folder = Path(folder)
        autoencoder = cls(json.loads((folder / "config.json").read_text()))
        autoencoder.load_inference_state(load_file(folder / "model.safetensors"))
        return autoencoder

    def inference_state(self) -> dict[str, Tensor]:
        """The state_dict without what only training needs (queues, counters)."""
        return {name: tensor for name, tensor in self.state_dict().items() if not self._only_training(name)}

    def load_inference_state(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError that names the keys if the state is not this autoencoder's."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not self._only_training(name)]
        if missing or unexpected:
            raise RuntimeError(f"weights do not fit the model: missing {missing}, unexpected {unexpected}")

    def _only_training(self, name: str) -> bool:
        return any(name.startswith(f"quantizer.{prefix}") for prefix in self.quantizer.training_state)
