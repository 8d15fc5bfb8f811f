"""The discriminator, the adversarial losses, and autoencoders that train with them."""

import io

import pytest
import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.training.gan_loss import GanLoss, PatchDiscriminator, adaptive_weight, hinge_loss
from tokenizer.training.recipe import DiscriminatorConfig, Recipe
from tokenizer.training.step import Trainer

NET = {"name": "vqgan", "width": 8, "multipliers": [1], "res_blocks": 1, "channels": 8, "attention": False}
SMALL = {"weight": 0.5, "start_step": 2, "channels": 8, "layers": 1, "lr": 1e-3}
CPU = torch.device("cpu")


def trainer_of(discriminator: dict, grad_accum_steps: int = 1, **recipe) -> Trainer:
    """A trainer whose quantizer draws noise."""
    torch.manual_seed(0)
    quantizer = {"name": "vp_vae", "codebook_size": 16, "dim": 2, "latents_per_code": 16}
    autoencoder = Autoencoder({"modality": "image", "net": NET, "quantizer": quantizer})
    settings = {"segment": 16, "warmup_steps": 1, "discriminator": DiscriminatorConfig(**discriminator), **recipe}
    return Trainer(autoencoder, build_modality("image", {}), Recipe(**settings), CPU, grad_accum_steps)


def gan_loss_of(trainer: Trainer) -> GanLoss:
    assert trainer.gan_loss is not None
    return trainer.gan_loss


def pictures(step: int = 0) -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


# -- net and losses -------------------------------------------------------------------------------------------------


def test_three_layers_judge_256_pixels_by_30_times_30_patches_as_in_pix2pix():
    assert PatchDiscriminator(DiscriminatorConfig(channels=2))(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_side_has_one_logit_and_one_pixel_less_has_none(layers: int):
    config = DiscriminatorConfig(channels=2, layers=layers)
    net, side = PatchDiscriminator(config), config.smallest_side
    assert net(torch.rand(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        net(torch.rand(1, 3, side - 1, side - 1))


def test_a_pictures_logits_do_not_depend_on_its_neighbours():
    net = PatchDiscriminator(DiscriminatorConfig(channels=8))
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_hinge_loss_solved_by_hand():
    """Real logits are 0 and .5 below 1; fake logits are 0 and 1 above -1."""
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])).item() == pytest.approx((0.25 + 0.5) / 2)


def test_the_generator_loss_is_minus_the_mean_logit_and_gives_the_discriminator_no_gradient():
    gan_loss = GanLoss(DiscriminatorConfig(**SMALL), CPU, seed=0, autocast=False)
    x_hat = pictures().requires_grad_()
    loss = gan_loss.generator_loss(x_hat)
    assert loss.item() == pytest.approx(-gan_loss.net(x_hat).mean().item())
    loss.backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in gan_loss.net.parameters())


def test_adaptive_weight_is_the_ratio_of_the_gradients_at_the_reconstruction():
    x_hat = pictures().requires_grad_()
    assert adaptive_weight(3 * x_hat.sum(), -0.5 * x_hat.sum(), x_hat).item() == pytest.approx(6)


def test_adaptive_weight_stays_finite_where_the_discriminator_has_no_gradient():
    x_hat = pictures().requires_grad_()
    assert adaptive_weight(x_hat.sum(), 0 * x_hat.sum(), x_hat).item() == 1e4


# -- training -------------------------------------------------------------------------------------------------------


def test_before_the_start_step_training_is_bitwise_the_same_as_without_a_discriminator():
    """It differs from the start step on, which shows that this test can fail."""
    plain, adversarial = trainer_of({}), trainer_of(SMALL)
    assert plain.gan_loss is None
    same = []
    for step in range(3):
        for trainer in (plain, adversarial):
            torch.manual_seed(step)  # for the quantizer's noise
            trainer.update(pictures(step), step)
        same.append(equal(plain.autoencoder.state_dict(), adversarial.autoencoder.state_dict()))
    assert same == [True, True, False]


def test_building_the_loss_draws_no_global_random_number():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    GanLoss(DiscriminatorConfig(**SMALL), CPU, seed=0, autocast=False)
    assert torch.equal(torch.rand(1), expected)


def test_the_discriminator_learns_to_tell_originals_from_reconstructions():
    trainer = trainer_of({**SMALL, "start_step": 0}, lr=0.0)  # the reconstructions do not improve
    losses = [trainer.update(pictures(), step).losses for step in range(30)]
    assert losses[0]["discriminator"] > 0.8
    assert losses[-1]["discriminator"] < 0.4
    assert losses[-1]["logits_real"] > 0 > losses[-1]["logits_fake"]


def test_the_autoencoder_learns_to_fool_the_discriminator():
    trainer = trainer_of({**SMALL, "start_step": 0, "lr": 0.0}, loss_weights={"l1": 0.1})
    losses = [trainer.update(pictures(), step).losses["adversarial"] for step in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_give_the_discriminator_losses_of_the_whole_batch(micro_batches: int):
    whole, cut = (trainer_of({**SMALL, "start_step": 0}, n, grad_clip=1e9) for n in (1, micro_batches))
    for trainer in (whole, cut):
        trainer.autoencoder.quantizer.eval()
    one, other = whole.update(pictures(), 0).losses, cut.update(pictures(), 0).losses
    for name in ("discriminator", "logits_real"):
        assert other[name].item() == pytest.approx(one[name].item(), rel=0.02)


def test_the_discriminators_gradient_is_clipped():
    trainer = trainer_of({**SMALL, "start_step": 0}, grad_clip=1e-3)
    trainer.update(pictures(), 0)
    norms = torch.stack([parameter.grad.norm() for parameter in gan_loss_of(trainer).net.parameters()])
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_discriminator_with_nan_weights_stops_the_step_before_any_weight_changes():
    trainer = trainer_of({**SMALL, "start_step": 0})
    net = gan_loss_of(trainer).net
    trainer.update(pictures(), 0)
    with torch.no_grad():
        net.layers[0].weight[0, 0, 0, 0] = torch.nan
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (trainer.autoencoder, net)]
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 2"):
        trainer.update(pictures(1), 1)
    after = [trainer.autoencoder.state_dict(), net.state_dict()]
    weights = [(a[n], b[n]) for a, b in zip(before, after, strict=True) for n in a if "quantizer" not in n]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_resumes_bitwise_from_the_saved_state(precision: str):
    straight, resumed = (trainer_of({**SMALL, "start_step": 1}, precision=precision) for _ in range(2))
    for step in range(3):
        straight.update(pictures(step), step)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (straight.autoencoder, straight.optimizer, gan_loss_of(straight))], file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for one, state in zip((resumed.autoencoder, resumed.optimizer, gan_loss_of(resumed)), saved, strict=True):
        one.load_state_dict(state)
    for trainer in (straight, resumed):
        torch.manual_seed(7)
        for step in (3, 4):
            trainer.update(pictures(step), step)
    assert equal(straight.autoencoder.state_dict(), resumed.autoencoder.state_dict())
    assert equal(gan_loss_of(straight).net.state_dict(), gan_loss_of(resumed).net.state_dict())


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, r"train\.discriminator\.layers is 0; it must be 1 or more"),
        ({"lr": -1.0}, r"train\.discriminator\.lr is -1\.0; it must be finite, 0 or more"),
        ({"weight": float("nan")}, r"train\.discriminator\.weight is nan; it must be finite, 0 or more"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**settings)


def test_a_crop_that_is_too_small_for_the_discriminator_is_refused():
    with pytest.raises(
        ValueError, match=r"train\.crop_size is 16; a discriminator of 3 layers needs 24 pixels or more"
    ):
        trainer_of({"weight": 0.1})
