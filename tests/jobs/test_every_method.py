"""Every configuration in configs/quantizers runs all commands: train, codebook, tokenize, verify, decode."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.config import load_config
from pipeline.tokens import TokenDataset
from pipeline.tokens.verify import verify
from tests.corpus import write_tar
from tests.jobs.helpers import TINY_NET, jpegs, tokenize_without_ray
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.tokenizer import Tokenizer
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer

METHODS = sorted((Path(__file__).parents[2] / "configs/quantizers").glob("*.yaml"))
SIZES = {"codebook_size": 64, "dim": 4}


def settings(file: Path) -> tuple[dict, dict]:
    """A small version of the quantizer, and the loss weights that `tokenmill train` would use."""
    given = load_config([str(file), "train.steps=4"])
    small = {key: value for key, value in SIZES.items() if key in given.quantizer}
    return {**given.quantizer, **small}, given.train.loss_weights


def trained(file: Path) -> Autoencoder:
    quantizer, loss_weights = settings(file)
    torch.manual_seed(0)
    net = {**TINY_NET, "patch_size": 4}
    autoencoder = Autoencoder({"modality": "image", "net": net, "quantizer": quantizer})
    recipe = Recipe(steps=4, lr=1e-3, warmup_steps=1, loss_weights=loss_weights)
    trainer = Trainer(autoencoder, build_modality("image", {}), recipe, "cpu")
    for step in range(4):
        result = trainer.update(torch.rand(8, 3, 64, 64), step)
        assert all(np.isfinite(value) for value in trainer.numbers(result).values())
    with torch.no_grad():
        autoencoder.eval().quantizer.fit(autoencoder.latents(torch.rand(16, 3, 64, 64)).flatten(0, -2))
    return autoencoder


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_method_trains_freezes_tokenizes_and_decodes(tmp_path, file):
    tokenizer = Tokenizer(trained(file), {})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shard = write_tar(tmp_path / "in/0.tar", jpegs(5))
    output = tokenize_without_ray(shard, str(tmp_path / "tokenizer"), tmp_path / "out")
    assert verify(output, deep=True).problems == []

    loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.id == tokenizer.id
    rows = list(TokenDataset(output.url))
    assert len(rows) == 5
    tokens = [row["tokens"] for row in rows]
    quantizers = tokenizer.autoencoder.quantizer.num_quantizers
    assert tokens[0].shape == ((quantizers, 5, 6) if quantizers > 1 else (5, 6))
    pictures = loaded.decode([t.astype(np.int64) for t in tokens], [{"height": 40, "width": 48}] * 5)
    assert all(picture.shape == (40, 48, 3) for picture in pictures)


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_method_says_source_command_and_results(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "arXiv" in text
    assert f"configs/quantizers/{file.name}" in text
    assert "ublished" in text
    assert "results/" in text
