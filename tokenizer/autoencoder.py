"""Encoder -> projection -> quantizer -> projection -> decoder.

Legend: x [B, channels, ...] as the modality batches it, z [B, ..., in_dim] channel-last latents.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.adapters.base.adapter import build_adapter, split
from tokenizer.errors import naming_damage
from tokenizer.nets.base.net import Net, build_net
from tokenizer.quantizers.base.quantizer import Quantizer, QuantizerOutput, build_quantizer


@dataclass
class AutoencoderOutput:
    x_hat: Tensor
    z: Tensor
    quantized: QuantizerOutput


class Autoencoder(nn.Module):
    """settings: {"modality": name, "net": {"name", ...}, "quantizer": {"name", ...}}: enough to build it again.

    An imported net has {"adapter": {"name", "version", "config", "processor"}} too, and the quantizer of the adapter's
    name is the one that came with it. model: its module with weights; without it, they are still to be loaded.
    """

    def __init__(self, settings: dict[str, Any], model: nn.Module | None = None):
        super().__init__()
        self.settings = settings
        self.net, imported = _parts(settings, model)
        self.quantizer = imported or build_quantizer(settings["quantizer"])
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if imported is None:
            self.project_in = nn.Linear(self.net.channels, self.quantizer.in_dim)
            self.project_out = nn.Linear(self.quantizer.dim, self.net.channels)

    @property
    def factor(self) -> int:
        """Input units (pixels, waveform samples) per token and dimension."""
        return self.net.factor

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """For training. A frozen tokenizer calls `latents` and `reconstruct` instead."""
        z = self.project_in(self.net.encode(x).movedim(1, -1))
        quantized = self.quantizer(z)
        return AutoencoderOutput(self.net.decode(self.project_out(quantized.z_q).movedim(-1, 1)), z, quantized)

    def latents(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The quantizer's input: [B, channels, ...] -> [B, ..., in_dim].

        mask [B, 1, F]: which frames are not padding.
        """
        return self.project_in(self.net.encode_frozen(x, mask).movedim(1, -1))

    def reconstruct(self, z_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """The decoder's output: [B, ..., dim] -> [B, channels, ...]. mask as above."""
        return self.net.decode_frozen(self.project_out(z_q).movedim(-1, 1), mask)

    def change_fit(self, settings: dict[str, Any]) -> None:
        """Changes quantizer settings that only `fit` reads, after training. Raises ValueError for any other setting."""
        quantizer = self.quantizer
        for name in settings:
            if name not in quantizer.fit_settings:
                allowed = ", ".join(quantizer.fit_settings) or "nothing"
                raise ValueError(
                    f"{name} of {quantizer.name} cannot change after training; settings that can: {allowed}"
                )
        quantizer.config = dataclasses.replace(quantizer.config, **settings)
        self.settings["quantizer"] |= settings

    def save(self, folder: str | Path) -> None:
        """Writes the settings to folder/config.json and the inference state to folder/model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.inference_state().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Autoencoder":
        """Raises FileNotFoundError if a file is missing, and TokenizerMismatch if one is damaged."""
        folder = Path(folder)
        with naming_damage(folder / "config.json"):
            autoencoder = cls(json.loads((folder / "config.json").read_text()))
        with naming_damage(folder / "model.safetensors"):
            autoencoder.load_inference_state(load_file(folder / "model.safetensors"))
        return autoencoder

    def inference_state(self) -> dict[str, Tensor]:
        """The state_dict without the entries that only training needs (queues, counters)."""
        return {name: tensor for name, tensor in self.state_dict().items() if not self._is_training_state(name)}

    def load_inference_state(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError with the missing and unexpected keys if the state does not fit this autoencoder."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not self._is_training_state(name)]
        if missing or unexpected:
            raise RuntimeError(f"weights do not fit the model: missing {missing}, unexpected {unexpected}")

    def _is_training_state(self, name: str) -> bool:
        return any(name.startswith(f"quantizer.{prefix}") for prefix in self.quantizer.training_state)


def _parts(settings: dict[str, Any], model: nn.Module | None) -> tuple[Net, Quantizer | None]:
    """The net, and an imported net's own quantizer if the settings choose it."""
    if "adapter" not in settings:
        return build_net(settings["net"]), None
    adapter = build_adapter(settings["adapter"])
    chosen = settings["quantizer"]["name"] == adapter.name
    model = adapter.build() if model is None else model
    net, quantizer = split(adapter, model, settings["quantizer"] if chosen else {})
    return net, quantizer if chosen else None
