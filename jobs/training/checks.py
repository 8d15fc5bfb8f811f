"""Checks of a training configuration before Ray starts. Imports no Ray."""

from dataclasses import asdict

import torch

from jobs.artifacts import check_member
from jobs.config import Config, ConfigError, checked
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.step import build_gan_loss, known_losses


def check(config: Config) -> None:
    """Raises ConfigError if net, quantizer, losses, discriminator or segment do not fit together."""
    try:
        modality = build_modality(config.model.modality, config.data.preprocess)
        autoencoder = Autoencoder({**asdict(config.model), "quantizer": config.quantizer})
        build_gan_loss(config.train.recipe(), modality, torch.device("cpu"))
    except (ValueError, TypeError, ImportError) as error:  # TypeError: settings of a residual quantizer's base
        raise ConfigError(str(error)) from error
    check_member(config.data.member, modality)
    known, factor = known_losses(autoencoder, modality), autoencoder.factor
    for name in config.train.loss_weights:
        if name not in known:
            raise ConfigError(f"train.loss_weights.{name}: there is no such loss; choose from: {', '.join(known)}")
    with checked("train.losses"):
        modality.losses(config.train.losses)
    if config.train.crop_size % factor:
        raise ConfigError(
            f"train.crop_size is {config.train.crop_size}; it must be a multiple of the net's factor, {factor}"
        )


def loss_weights(config: Config) -> dict[str, float]:
    """The weights that training uses, defaults included."""
    autoencoder = Autoencoder({**asdict(config.model), "quantizer": config.quantizer})
    modality = build_modality(config.model.modality, config.data.preprocess)
    return {**known_losses(autoencoder, modality), **config.train.loss_weights}
