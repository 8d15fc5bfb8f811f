"""A family of published tokenizers, split into a net and a quantizer with the interfaces of ours.

The modules are those of the family's own library, so the tokens are its tokens. From then on an imported tokenizer is
like any other. An adapter adds what the library leaves to its caller: which lengths and pixel ranges it accepts.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizer.errors import MissingPackage, TokenizerMismatch, UnsupportedModel
from tokenizer.nets.base.net import Net
from tokenizer.quantizers.base.quantizer import Quantizer, QuantizerOutput, mean_squared
from tokenizer.registry import Registry

ADAPTERS: Registry["Adapter"] = Registry("adapter", "tokenizer.adapters")


@dataclass(frozen=True)
class Facts:
    """What the config of a model says. factor: input units per token and dimension. dim: channels of the latents.
    num_quantizers: all that the model has. sample_rate: in Hz, for audio."""

    factor: int
    dim: int
    codebook_size: int
    num_quantizers: int = 1
    min_quantizers: int = 1
    sample_rate: int = 0


class Adapter:
    """One family. config: its own config.json. processor: what it reads of preprocessor_config.json. A subclass
    implements what raises AssertionError here.

    model is the family's module without its quantizer, and quantizer is that module.
    """

    name: ClassVar[str]
    modality: ClassVar[str]
    package: ClassVar[str] = "transformers"
    classes: ClassVar[tuple[str, str]]  # of the package: config and model
    model_types: ClassVar[tuple[str, ...]]  # in config.json: "model_type", or diffusers' "_class_name"
    processor_keys: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1  # raised if a change of the adapter changes tokens; part of the tokenizer's id
    quantizer_name: ClassVar[str] = "quantizer"  # attribute of the model
    # whether samples are encoded and decoded one at a time, since padding or rounding would change their tokens
    one_by_one: ClassVar[bool] = False
    pads: ClassVar[bool] = False  # whether the model itself pads a sample to whole tokens
    decodes: ClassVar[bool] = True

    def __init__(self, config: dict[str, Any], processor: dict[str, Any]):
        self.config, self.processor = config, processor
        self.facts = self.read_facts(self.model_config())

    def model_config(self) -> Any:
        """The library's config object. Its attributes have the library's defaults."""
        return getattr(library(self.package), self.classes[0]).from_dict(self.config)

    def build(self) -> nn.Module:
        """The family's model, whose weights are still to be loaded."""
        with _without_init():
            return getattr(library(self.package), self.classes[1])(self.model_config())

    def read(self, folder: Path) -> nn.Module:
        """The family's model with the weights of a folder: safetensors only, since other formats can run code."""
        return getattr(library(self.package), self.classes[1]).from_pretrained(folder, dtype=torch.float32, **READING)

    def read_facts(self, config: Any) -> Facts:
        """Raises UnsupportedModel for a model of this family that cannot be used."""
        raise AssertionError

    def encode(self, model: Any, x: Tensor) -> Tensor:
        """As Net.encode. Pictures are in 0..1."""
        raise AssertionError

    def decode(self, model: Any, h: Tensor) -> Tensor:
        raise AssertionError

    def quantize(self, quantizer: Any, z: Tensor, num_quantizers: int) -> Tensor:
        """[N, dim] -> indices [N, num_quantizers]."""
        raise AssertionError

    def codes(self, quantizer: Any, indices: Tensor) -> Tensor:
        """[N, num_quantizers] -> [N, dim]."""
        raise AssertionError

    def codebook(self, quantizer: Any, number: int) -> Tensor:
        """What quantizer `number` adds to the latent, for each code: [K, dim]."""
        raise AssertionError


READING: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}


class ImportedNet(Net):
    def __init__(self, adapter: Adapter, model: nn.Module):
        super().__init__()
        self.adapter, self.model = adapter, model
        self.factor, self.channels = adapter.facts.factor, adapter.facts.dim
        self.one_by_one, self.pads, self.decodes = adapter.one_by_one, adapter.pads, adapter.decodes
        if adapter.modality == "audio":
            self.in_channels, self.spatial_dims = 1, 1

    def encode(self, x: Tensor) -> Tensor:
        return self.adapter.encode(self.model, x)

    def decode(self, h: Tensor) -> Tensor:
        return self.adapter.decode(self.model, h)


class ImportedQuantizer(Quantizer):
    """The family's quantizer with the first num_quantizers of its codebooks. Its codes are frozen, in training too:
    then gradients pass straight through, and `commitment` draws the latents to the codes."""

    default_loss_weights = {"commitment": 0.25}

    def __init__(self, adapter: Adapter, quantizer: nn.Module, config: "ImportedConfig"):
        super().__init__()
        self.adapter, self.model, self.config = adapter, quantizer, config
        self.name = adapter.name  # type: ignore[misc]
        self.codebook_size, self.num_quantizers = adapter.facts.codebook_size, config.num_quantizers
        self.in_dim = self.dim = adapter.facts.dim

    @property
    def codebook(self) -> Tensor:
        """[K, dim]; [Q, K, dim] with several quantizers."""
        tables = [self.adapter.codebook(self.model, q) for q in range(self.num_quantizers)]
        return (torch.stack(tables) if self.num_quantizers > 1 else tables[0]).float()

    def _encode(self, z: Tensor) -> Tensor:
        indices = self.adapter.quantize(self.model, z, self.num_quantizers)
        return indices if self.num_quantizers > 1 else indices[:, 0]

    def _decode(self, indices: Tensor) -> Tensor:
        return self.adapter.codes(self.model, indices.reshape(len(indices), self.num_quantizers)).float()

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        out = self._eval_forward(z.detach())
        losses = {"commitment": mean_squared(z - out.z_q)}
        return QuantizerOutput(z + (out.z_q - z).detach(), out.indices, losses)


@dataclass
class ImportedConfig:
    """num_quantizers: how many of a residual quantizer's codebooks to use; 0 uses all."""

    num_quantizers: int = 0


def build_adapter(settings: dict[str, Any]) -> Adapter:
    """From {"name", "version", "config", "processor"}. Raises TokenizerMismatch for another version."""
    cls = ADAPTERS.get(settings["name"])
    if settings["version"] != cls.version:
        raise TokenizerMismatch(
            f"this tokenizer was imported by version {settings['version']} of the adapter {cls.name}, and this version "
            f"of tokenmill has version {cls.version}, which can give other tokens; import the model again"
        )
    return cls(settings["config"], settings["processor"])


def split(adapter: Adapter, model: nn.Module, quantizer: dict[str, Any]) -> tuple[ImportedNet, ImportedQuantizer]:
    """The net and the quantizer of a family's model. quantizer: settings, with `name`."""
    facts = adapter.facts
    config = ImportedConfig(**{key: value for key, value in quantizer.items() if key != "name"})
    config.num_quantizers = config.num_quantizers or facts.num_quantizers
    if not facts.min_quantizers <= config.num_quantizers <= facts.num_quantizers:
        raise UnsupportedModel(
            f"num_quantizers is {config.num_quantizers}; this {adapter.name} model has {facts.min_quantizers} to "
            f"{facts.num_quantizers}"
        )
    path, _, name = adapter.quantizer_name.rpartition(".")
    parent = model.get_submodule(path)
    codes = getattr(parent, name)
    delattr(parent, name)
    return ImportedNet(adapter, model), ImportedQuantizer(adapter, codes, config)


def library(package: str) -> Any:
    """Imports a package, and switches its advice off, and its progress bars except those of downloads. Raises
    MissingPackage."""
    try:
        found = importlib.import_module(package)
        utils = importlib.import_module(f"{package}.utils")
    except ImportError as error:
        raise MissingPackage(f"this tokenizer needs the package {package}: pip install 'tokenmill[hf]'") from error
    utils.logging.set_verbosity_error()
    if package != "huggingface_hub":
        utils.logging.disable_progress_bar()
    return found


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """Modules made in this block do not spend time on random weights, which are about to be replaced."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        yield
        return
    with no_init_weights():
        yield
