"""The training step: gradient accumulation, the EMA of the weights, and losses that are not finite."""

import pytest
import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.ema import EMA
from tokenizer.training.recipe import Recipe
from tokenizer.training.step import Trainer, compile_nets

NET = {"name": "vqgan", "width": 8, "multipliers": [1], "res_blocks": 1, "channels": 8, "attention": False}
RECIPE = Recipe(steps=10, lr=1e-2, warmup_steps=1, grad_clip=1e9)


def trainer_of(quantizer: dict, **settings) -> Trainer:
    torch.manual_seed(0)
    autoencoder = Autoencoder({"modality": "image", "net": NET, "quantizer": quantizer})
    return Trainer(autoencoder, build_modality("image", {}), RECIPE, "cpu", **settings)


def pictures(step: int = 0) -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.autoencoder.state_dict().items()}


# -- gradient accumulation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 4])  # of 6 pictures; 4 gives micro-batches of 2, 2 and 2
def test_accumulated_gradients_and_losses_are_those_of_the_whole_batch(steps: int):
    whole, cut = trainer_of({"name": "fsq"}), trainer_of({"name": "fsq"}, grad_accum_steps=steps)
    one, other = whole.update(pictures(), 0), cut.update(pictures(), 0)
    for a, b in zip(whole.autoencoder.parameters(), cut.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    for name in ("l1", "mse"):  # not log_mse: a mean of logarithms is not the logarithm of the mean
        assert other.losses[name].item() == pytest.approx(one.losses[name].item(), rel=1e-5)


def test_codes_replaced_in_any_micro_batch_lose_their_momentum():
    quantizer = {"name": "vq_vae", "codebook_size": 64, "dim": 4, "replace_after": 1}
    trainer = trainer_of(quantizer, grad_accum_steps=2)
    calls: list[dict[str, Tensor]] = []
    reset = trainer._reset_moments
    trainer._reset_moments = lambda rows: (calls.append(rows), reset(rows))[1]  # type: ignore[method-assign]
    for step in range(4):
        trainer.update(pictures(step), step)
    assert len(calls) == 8
    assert all("embedding" in rows for rows in calls[-2:])


# -- EMA ------------------------------------------------------------------------------------------------------------


def test_ema_is_that_computed_by_hand():
    """The decay is 0, then step / (step + 10), then the given one."""
    trainer = trainer_of({"name": "fsq"})
    ema, name = EMA(trainer.autoencoder, decay=0.15), "project_in.weight"
    seen = []
    for step in range(3):
        trainer.update(pictures(step), step)
        ema.update(step)
        seen.append(weights(trainer)[name])
    expected = seen[0]
    for decay, value in ((1 / 11, seen[1]), (0.15, seen[2])):
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.values[name], expected)


def test_ema_includes_codes_that_are_buffers():
    autoencoder = trainer_of({"name": "ema_vq", "codebook_size": 8, "dim": 4}).autoencoder
    assert "quantizer.embedding" in EMA(autoencoder, 0.9).values


def test_ema_weights_are_saved_and_the_trained_ones_come_back(tmp_path):
    trainer = trainer_of({"name": "fsq"})
    ema = EMA(trainer.autoencoder, decay=0.9)
    for step in range(3):
        trainer.update(pictures(step), step)
        ema.update(step)
    before = weights(trainer)
    with ema.applied():
        trainer.autoencoder.save(tmp_path)
    after, saved = weights(trainer), Autoencoder.load(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(saved[name], value) for name, value in ema.values.items())
    assert not torch.equal(saved["project_in.weight"], before["project_in.weight"])


# -- losses that are not finite -------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_no_weight():
    trainer = trainer_of({"name": "fsq"})
    trainer.update(pictures(), 0)
    before = weights(trainer)
    x = pictures(1)
    x[2, 1, 5, 5] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan .* at step 2; lower train\.lr, or raise train\.warmup_steps"
    ):
        trainer.update(x, 1)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


class Spiky(nn.Module):
    """l1, and an infinite mse without a gradient."""

    def forward(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        return {"l1": (x - x_hat).abs().mean(), "mse": x.mean() * torch.inf}


def test_a_loss_that_is_not_finite_changes_no_weight_although_its_gradient_is_finite():
    trainer = trainer_of({"name": "fsq"})
    trainer.losses = Spiky()
    trainer.loss_weights["mse"] = 1.0
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"the loss is inf and the norm of its gradient 0?\.?\d.* at step 1;"):
        trainer.update(pictures(), 0)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_laps_name_the_stages_of_an_update_in_order():
    trainer = trainer_of({"name": "fsq"}, grad_accum_steps=2)
    stages: list[str] = []
    trainer.lap = stages.append
    trainer.update(pictures(), 0)
    assert stages == ["forward", "backward", "forward", "backward", "optimizer"]


def test_compiled_nets_train_as_plain_ones_do_and_are_saved_the_same_way(tmp_path):
    plain, compiled = trainer_of({"name": "fsq"}), trainer_of({"name": "fsq"})
    compile_nets(
        compiled.autoencoder, backend="aot_eager"
    )  # everything except C++ code generation, which takes a minute
    one, other = plain.update(pictures(), 0), compiled.update(pictures(), 0)
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-3)
    assert compiled.autoencoder.net.encode is not plain.autoencoder.net.encode
    compiled.autoencoder.save(tmp_path)
    assert Autoencoder.load(tmp_path).state_dict().keys() == plain.autoencoder.state_dict().keys()


# -- parameter groups -----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_lr_scale_still_trains():
    """Earlier versions saved no lr_scale in the parameter groups."""
    trainer = trainer_of({"name": "fsq"})
    trainer.update(pictures(), 0)
    state = trainer.optimizer.state_dict()
    del state["param_groups"][0]["lr_scale"]
    trainer.optimizer.load_state_dict(state)
    trainer.update(pictures(1), 1)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(RECIPE.lr)
