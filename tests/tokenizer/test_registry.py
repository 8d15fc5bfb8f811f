"""A registry finds every class in its package: a new method is one new file, and names are unique."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizer.quantizers
from jobs.config import load_config
from tests.corpus import picture
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.base.quantizer import QUANTIZERS, build_quantizer
from tokenizer.registry import Registry
from tokenizer.tokenizer import Tokenizer
from tokenizer.training.step import Trainer

NEW_QUANTIZER = """
from dataclasses import dataclass

import torch
from torch import nn

from tokenizer.quantizers.base.straight_through import straight_through
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.codebook import CodebookQuantizer


@dataclass
class ChebyshevConfig:
    codebook_size: int = 16
    dim: int = 3


@QUANTIZERS.register("chebyshev")
class Chebyshev(CodebookQuantizer):
    Config = ChebyshevConfig
    default_loss_weights = {"codebook": 1.0}

    def __init__(self, config):
        super().__init__(config.codebook_size, config.dim)
        self.embedding = nn.Parameter(torch.randn(config.codebook_size, config.dim))

    def _live_codes(self):
        return self.embedding

    def _encode(self, z):
        return (z[:, None] - self.codes).abs().amax(dim=2).argmin(dim=1)

    def _train_forward(self, z):
        self._thaw()
        indices = self._encode(z)
        e = self.embedding[indices]
        return QuantizerOutput(straight_through(z, e), indices, {"codebook": mean_squared(z.detach() - e)})
"""


@contextlib.contextmanager
def new_file_in_the_package(folder: Path) -> Iterator[None]:
    """chebyshev.py, as if it were in tokenizer/quantizers/."""
    (folder / "chebyshev.py").write_text(NEW_QUANTIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.quantizers, "__path__", [*tokenizer.quantizers.__path__, str(folder)])
        patch.setattr(QUANTIZERS, "_classes", dict(QUANTIZERS._classes))
        try:
            yield
        finally:
            del tokenizer.quantizers.chebyshev
            del sys.modules["tokenizer.quantizers.chebyshev"]


def test_a_new_quantizer_needs_only_one_file(tmp_path):
    with new_file_in_the_package(tmp_path):
        assert "chebyshev" in QUANTIZERS.names()
        out = build_quantizer({"name": "chebyshev", "codebook_size": 4})(torch.randn(5, 3))
        assert out.z_q.shape == (5, 3)
        config = load_config(["quantizer.name=chebyshev", "quantizer.codebook_size=8"])
        assert config.quantizer == {"name": "chebyshev", "codebook_size": 8, "dim": 3}
        with pytest.raises(ValueError, match=r"unknown key quantizer.codebok_size; did you mean quantizer.codebook"):
            load_config(["quantizer.name=chebyshev", "quantizer.codebok_size=8"])


def test_a_new_quantizer_trains_and_becomes_a_tokenizer_without_other_edits(tmp_path):
    arrays = [picture(16, 24, seed) for seed in range(3)]
    net = {"name": "vqgan", "width": 8, "multipliers": [1, 2], "res_blocks": 1, "channels": 8, "attention": False}
    with new_file_in_the_package(tmp_path):
        config = load_config(["quantizer.name=chebyshev", "quantizer.codebook_size=8", "train.warmup_steps=0"])
        made = Autoencoder({"modality": "image", "net": net, "quantizer": config.quantizer})
        before = made.quantizer.embedding.detach().clone()
        modality = build_modality("image", {})
        x = modality.batch(arrays, made.factor).x
        assert "codebook" in Trainer(made, modality, config.train, "cpu").update(x, 0).losses
        assert not torch.equal(made.quantizer.embedding, before)
        made.quantizer.fit(torch.stack(LatentEncoder(made, {}).latents(arrays)).flatten(0, -2))
        frozen = Tokenizer(made, {})
        frozen.save_pretrained(tmp_path / "saved")
        loaded = Tokenizer.from_pretrained(tmp_path / "saved")
        tokens, sizes = frozen.encode_batch(arrays), [{"height": 16, "width": 24}] * 3
        assert loaded.id == frozen.id
        assert all(np.array_equal(a, b) for a, b in zip(loaded.encode_batch(arrays), tokens, strict=True))
        assert [array.shape for array in loaded.decode(tokens, sizes)] == [(16, 24, 3)] * 3


def test_a_removed_file_leaves_no_trace(tmp_path):
    names = QUANTIZERS.names()
    with new_file_in_the_package(tmp_path):
        build_quantizer({"name": "chebyshev"})
    assert QUANTIZERS.names() == names
    with pytest.raises(ValueError, match="unknown quantizer 'chebyshev'"):
        load_config(["quantizer.name=chebyshev"])


def test_a_file_in_the_package_is_found_without_any_other_edit(tmp_path, monkeypatch):
    (tmp_path / "things").mkdir()
    (tmp_path / "thing.py").write_text(
        "from tokenizer.registry import Registry\nTHINGS = Registry('thing', 'things')\n"
    )
    (tmp_path / "things" / "__init__.py").touch()
    (tmp_path / "things" / "a.py").write_text("from thing import THINGS\n@THINGS.register('one')\nclass One: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = importlib.import_module("thing").THINGS
    assert registry.names() == ["one"]
    assert registry.get("one").name == "one"


def test_an_unknown_name_lists_the_names_and_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'fsq'.*fsp, fsq, .*vp_vae, vq_vae"):
        build_quantizer({"name": "fsqq"})


def like(module: str, qualname: str = "Thing") -> type:
    """A class with that name and module."""
    return type(qualname, (), {"__module__": module})


@pytest.mark.parametrize("second", [like("two.module"), like("one.module", "Other")])
def test_a_registered_name_is_refused_for_another_class_or_module(second):
    registry: Registry[Any] = Registry("thing", "tokenizer.quantizers")
    registry.register("it")(like("one.module"))
    with pytest.raises(ValueError, match=r"thing 'it' is already Thing of one\.module"):
        registry.register("it")(second)


def test_a_module_that_is_reloaded_can_register_its_name_again():
    registry: Registry[Any] = Registry("thing", "tokenizer.quantizers")
    registry.register("it")(like("one.module"))
    again = like("one.module")
    assert registry.register("it")(again) is again


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="codebok_size"):
        build_quantizer({"name": "fsq", "codebok_size": 64})
