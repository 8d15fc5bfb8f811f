"""The configurations in configs/quantizers load, and train with the loss weights of their sources."""

from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.training.checks import loss_weights
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.step import known_losses

CONFIGS = Path(__file__).parents[2] / "configs"
METHOD_FILES = sorted((CONFIGS / "quantizers").glob("*.yaml"))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("gm_vq", {"l1": 0.0, "mse": 1.0, "prior": 1 / 48, "latent": 1e-2}),
        ("gm_vq_entropy", {"l1": 0.0, "mse": 1.0, "prior": 5 / 48, "latent": 1e-2}),
        ("sq_vae", {"l1": 0.0, "log_mse": 1.0, "kl_discrete": 1 / 24, "kl_continuous": 1 / 24}),
        ("gumbel", {"kl": 2 * 0.06327039811675479 * 5e-4}),
        ("lfq", {"entropy_per_token": 0.02, "entropy_of_mean": 0.02}),
        ("vq_vae_opt", {"commitment": 0.0}),
    ],
)
def test_shipped_methods_train_with_the_weights_of_their_sources(file, expected):
    config = load_config([str(CONFIGS / "cifar10.yaml"), str(CONFIGS / "quantizers" / f"{file}.yaml")])
    found = loss_weights(config)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert config.train.lr == (1e-2 if file.startswith("gm_vq") else 1e-4)


@pytest.mark.parametrize("file", METHOD_FILES, ids=lambda file: file.stem)
def test_a_shipped_configuration_loads_and_weighs_only_losses_that_it_has(file):
    config = load_config([str(CONFIGS / "cifar10.yaml"), str(file)])
    assert file.stem.startswith(config.quantizer["name"])
    model = {"modality": "image", "net": config.model.net, "quantizer": config.quantizer}
    assert set(config.train.loss_weights) <= set(known_losses(Autoencoder(model), build_modality("image", {})))
