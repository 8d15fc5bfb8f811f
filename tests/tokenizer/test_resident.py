"""Batches made on the device, compared to `training_batches`."""

import numpy as np
import pytest
import torch

from tokenizer.modalities.base import build_modality
from tokenizer.training.recipe import Recipe
from tokenizer.training.resident import resident_batches
from tokenizer.training.trial import Trial, run_trial, training_batches

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pictures(count: int = 50, side: int = 16) -> np.ndarray:
    """Noise: uint8 [count, side, side, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("device", DEVICES)
def test_resident_batches_are_bitwise_those_of_training_batches(device: str):
    recipe = Recipe(
        steps=9, batch_size=16, segment=16, seed=3
    )  # 144 samples from 50 pictures, so epochs end within batches
    slow = list(training_batches(build_modality("image", {}), pictures(), recipe, factor=4))
    fast = list(resident_batches(pictures(), recipe, 4, torch.device(device)))
    assert [step for step, _ in fast] == [step for step, _ in slow] == list(range(9))
    for (_, x), (_, expected) in zip(fast, slow, strict=True):
        assert torch.equal(x.cpu(), expected)
        assert x.stride() == expected.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_making_a_batch_never_waits_for_the_gpu():
    batches = resident_batches(pictures(), Recipe(steps=3, batch_size=16, segment=16), 4, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_trial_has_the_same_result_with_resident_pictures():
    model = {"modality": "image", "net": {"name": "resnet32", "channels": 8, "res_blocks": 1}}
    trial = Trial({**model, "quantizer": {"name": "vq_vae", "codebook_size": 16, "dim": 4}}, Recipe(4, 4, 16))
    slow, fast = (run_trial(trial, pictures(12), pictures(6), resident=resident) for resident in (False, True))
    assert fast.examples == slow.examples
    assert [row["loss"] for row in fast.history] == [row["loss"] for row in slow.history]


@pytest.mark.parametrize(
    ("arrays", "segment", "message"),
    [
        (pictures(4, side=24), 16, r"\[N, 16, 16, 3\], since train\.crop_size is 16"),  # would need crops
        (list(pictures(4)), 16, "one uint8 array"),
        (pictures(4).astype(np.float32), 16, "one uint8 array"),
        (pictures(4, side=18), 18, r"multiple of the net's factor, 4"),  # would need padding
    ],
)
def test_pictures_that_need_cropping_or_padding_are_refused(arrays, segment: int, message: str):
    with pytest.raises(ValueError, match=message):
        resident_batches(arrays, Recipe(segment=segment), 4, torch.device("cpu"))
