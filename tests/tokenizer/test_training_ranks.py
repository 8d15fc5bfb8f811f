"""Every registered quantizer, trained by two real processes under DistributedDataParallel on different pictures.

All parameters and buffers must stay equal to the bit on both ranks. If a method draws no random numbers, two ranks
with one batch each must have the same gradient as one rank with both batches.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.tokenizer.ranks import RANKS, measured_by_ranks
from tests.tokenizer.test_contract import CASES, NAMED, Case
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.recipe import DiscriminatorConfig, Recipe
from tokenizer.training.step import Trainer

NET = {"name": "vqgan", "width": 8, "multipliers": [1, 1], "res_blocks": 1, "channels": 8, "attention": False}
STEPS, BATCH = 3, 4
# these draw no noise, and their codes start from k-means in the first step
EXACT = [
    case
    for case in NAMED
    if case.name in ("fsq", "lfq", "bsq", "ibq", "vq_vae", "ema_vq", "sim_vq", "residual", "product")
]


def pictures(rank: int, step: int) -> Tensor:
    """[BATCH, 3, 32, 32]; the ranks also differ in brightness and contrast."""
    x = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(100 * step + rank))
    return 0.2 * rank + (0.4 + 0.2 * rank) * x


def trainer_of(case: Case, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    autoencoder = Autoencoder({"modality": "image", "net": NET, "quantizer": {"name": case.name, **case.settings}})
    recipe = Recipe(lr=1e-3, warmup_steps=1, grad_clip=1e9)  # no gradient is clipped
    return Trainer(autoencoder, build_modality("image", {}), recipe, "cpu", **settings)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.autoencoder.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def train(rank: int, case: Case, **settings: Any) -> dict[str, Any]:
    """The state after STEPS steps, and the gradients of the first step."""
    trainer = trainer_of(case, **settings)
    trainer.model = DistributedDataParallel(trainer.autoencoder, broadcast_buffers=False)  # as Ray Train wraps it
    torch.manual_seed(rank + 1)  # as in training: each rank draws its own noise
    trainer.update(pictures(rank, 0), 0)
    first = gradients(trainer)
    for step in range(1, STEPS):
        trainer.update(pictures(rank, step), step)
    return {"state": trainer.autoencoder.state_dict(), "gradients": first}


def train_with_discriminator(rank: int) -> dict[str, Any]:
    """The discriminator's state after STEPS steps, and its gradients in the first step."""
    trainer = adversarial_trainer()
    trainer.model = DistributedDataParallel(trainer.autoencoder, broadcast_buffers=False)
    trainer.update(pictures(rank, 0), 0)
    first = discriminator_gradients(trainer)
    for step in range(1, STEPS):
        trainer.update(pictures(rank, step), step)
    assert trainer.gan_loss is not None
    return {"state": trainer.gan_loss.net.state_dict(), "gradients": first}


def adversarial_trainer() -> Trainer:
    torch.manual_seed(0)
    autoencoder = Autoencoder({"modality": "image", "net": NET, "quantizer": {"name": "fsq"}})
    discriminator = DiscriminatorConfig(weight=0.5, start_step=0, channels=8, layers=2)
    recipe = Recipe(lr=1e-3, warmup_steps=1, grad_clip=1e9, discriminator=discriminator)
    return Trainer(autoencoder, build_modality("image", {}), recipe, "cpu")


def discriminator_gradients(trainer: Trainer) -> Tensor:
    assert trainer.gan_loss is not None
    parameters = trainer.gan_loss.net.parameters()
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


class Spiky(nn.Module):
    """l1, and on rank 1 an infinite mse without a gradient."""

    def forward(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        spike = torch.inf if torch.distributed.get_rank() == 1 else 0.0
        return {"l1": (x - x_hat).abs().mean(), "mse": torch.tensor(spike)}


def spike(rank: int) -> str:
    trainer = trainer_of(Case("fsq", "fsq", {}))
    trainer.model = DistributedDataParallel(trainer.autoencoder, broadcast_buffers=False)
    trainer.losses, trainer.loss_weights["mse"] = Spiky(), 1.0
    try:
        trainer.update(pictures(rank, 0), 0)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def measure(rank: int) -> dict[str, Any]:
    found = {case.label: train(rank, case) for case in CASES}
    found["discriminator"] = train_with_discriminator(rank)
    found["spike"] = spike(rank)
    return found | {f"{case.label} accumulated": train(rank, case, grad_accum_steps=2) for case in NAMED}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return measured_by_ranks(measure, tmp_path_factory.mktemp("training_ranks"))


@pytest.mark.parametrize("label", [case.label for case in CASES] + [f"{case.label} accumulated" for case in NAMED])
def test_weights_and_statistics_are_the_same_on_every_rank(ranks: list[dict[str, Any]], label: str):
    first, second = (found[label]["state"] for found in ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.label)
def test_two_ranks_have_the_gradient_of_one_rank_with_both_batches(ranks: list[dict[str, Any]], case: Case):
    alone = trainer_of(case)
    alone.update(torch.cat([pictures(rank, 0) for rank in range(RANKS)]), 0)
    expected, found = gradients(alone), ranks[0][case.label]["gradients"]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-3, name


def test_one_rank_alone_would_have_another_gradient(ranks: list[dict[str, Any]]):
    """Shows that the test above can fail."""
    alone = trainer_of(EXACT[0])
    alone.update(pictures(0, 0), 0)
    name = "net.encoder.0.weight" if "net.encoder.0.weight" in gradients(alone) else next(iter(gradients(alone)))
    expected, found = gradients(alone)[name], ranks[0][EXACT[0].label]["gradients"][name]
    assert (found - expected).norm() > 0.05 * expected.norm()


def test_discriminators_are_the_same_on_every_rank_and_have_learned(ranks: list[dict[str, Any]]):
    first, second = (found["discriminator"]["state"] for found in ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    gan_loss = adversarial_trainer().gan_loss
    assert gan_loss is not None
    assert not any(torch.equal(first[name], value) for name, value in gan_loss.net.named_parameters())


def test_two_ranks_have_the_discriminator_gradient_of_one_rank_with_both_batches(ranks: list[dict[str, Any]]):
    alone = adversarial_trainer()
    alone.update(torch.cat([pictures(rank, 0) for rank in range(RANKS)]), 0)
    expected, found = discriminator_gradients(alone), ranks[0]["discriminator"]["gradients"]
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_an_infinite_loss_on_one_rank_stops_both(ranks: list[dict[str, Any]]):
    assert ranks[0]["spike"] == ranks[1]["spike"]
    assert ranks[0]["spike"].startswith("the loss is inf and the norm of its gradient ")
