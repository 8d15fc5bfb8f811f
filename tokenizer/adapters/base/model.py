"""A folder in the layout of the Hugging Face Hub to a frozen tokenizer."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokenizer.adapters.base.adapter import ADAPTERS, Adapter, build_adapter
from tokenizer.autoencoder import Autoencoder
from tokenizer.errors import UnsupportedModel, naming_damage
from tokenizer.modalities.base import MODALITIES
from tokenizer.tokenizer import Tokenizer

NOT_IDENTITY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "_diffusers_version")


@dataclass
class ImportedModel:
    """A family's model with its weights. about: what a tokenizer keeps of it, except for the weights."""

    adapter: Adapter
    model: nn.Module
    about: dict[str, Any]

    def freeze(self, num_quantizers: int = 0, preprocessing: dict[str, Any] | None = None) -> Tokenizer:
        """The tokenizer. num_quantizers: how many codebooks of a residual quantizer to use; 0 uses all. preprocessing:
        fields of the modality's Config; the sample rate is always the model's. Raises UnsupportedModel."""
        adapter = self.adapter
        quantizer = {"name": adapter.name, "num_quantizers": num_quantizers or adapter.facts.num_quantizers}
        settings = {"modality": adapter.modality, "net": {"name": adapter.name}, "quantizer": quantizer}
        autoencoder = Autoencoder({**settings, "adapter": self.about}, self.model)
        return Tokenizer(autoencoder, _preprocessing(adapter, preprocessing or {}))


def read_model(folder: Path) -> ImportedModel:
    """The model of a folder: config.json, *.safetensors and perhaps preprocessor_config.json.

    Raises FileNotFoundError if a file is missing, UnsupportedModel, TokenizerMismatch for a damaged file, and
    MissingPackage.
    """
    with naming_damage(folder / "config.json", "download it again"):
        about = _settings(folder, json.loads((folder / "config.json").read_text()))
        adapter = build_adapter(about)
    _require_safetensors(folder)
    with naming_damage(folder, "download it again"):
        return ImportedModel(adapter, adapter.read(folder), about)


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer keeps of an imported model, except for its weights."""
    kind = config.get("model_type") or config.get("_class_name")
    adapter = _adapter_of(kind, folder)
    config = config.get("vq_config", config)  # of a model of text and pictures
    processor = _read_processor(folder / "preprocessor_config.json")
    return {
        "name": adapter.name,
        "version": adapter.version,
        "config": {key: value for key, value in config.items() if key not in NOT_IDENTITY},
        "processor": {key: value for key, value in processor.items() if key in adapter.processor_keys},
    }


def _adapter_of(kind: Any, folder: Path) -> type[Adapter]:
    adapters = [ADAPTERS.get(name) for name in ADAPTERS.names()]
    for adapter in adapters:
        if kind in adapter.model_types:
            return adapter
    known = sorted(name for adapter in adapters for name in adapter.model_types)
    raise UnsupportedModel(
        f"{folder}/config.json says that the model is {kind!r}; tokenmill imports: {', '.join(known)}"
    )


def _read_processor(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    with naming_damage(file, "download it again"):
        return dict(json.loads(file.read_text()))


def _require_safetensors(folder: Path) -> None:
    """Raises UnsupportedModel if the weights are pickled: those can run code."""
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if not others:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    raise UnsupportedModel(
        f"{folder} holds its weights as {others[0]}, a format that can run code when it is loaded; use a revision of "
        "the model with *.safetensors, or convert it where you trust it"
    )


def _preprocessing(adapter: Adapter, given: dict[str, Any]) -> dict[str, Any]:
    """All fields of the modality's Config."""
    rate = adapter.facts.sample_rate
    if rate and given.get("sample_rate", rate) != rate:
        raise UnsupportedModel(
            f"preprocess.sample_rate is {given['sample_rate']}; this model needs {rate}, so leave it out"
        )
    own = {"sample_rate": rate} if rate else {}
    return dataclasses.asdict(MODALITIES.get(adapter.modality).Config(**{**given, **own}))
