"""Training batches of pictures that all stay on the device.

Cropping one picture after the other in Python takes longer than a GPU takes to train on them.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer.training.step import Recipe


def resident_batches(
    pictures: Sequence[np.ndarray], recipe: Recipe, factor: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(step, x) for every step, x [B, 3, S, S] float32 on the device: bit for bit the batches of `training_batches`.

    pictures: one uint8 array [N, S, S, 3]. Raises ValueError unless S is recipe.segment and a multiple of factor: then
    a crop is the whole picture, and the only random choice is whether to mirror it. Never waits for the device.
    """
    side = recipe.segment
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.shape[1:] != (side, side, 3):
        raise ValueError(
            f"training pictures can stay on the device only as one uint8 array [N, {side}, {side}, 3], "
            f"since train.crop_size is {side}"
        )
    if side % factor:
        raise ValueError(f"train.crop_size is {side}; it must be a multiple of {factor}, as the net is")
    return _resident_batches(torch.tensor(pictures, device=device), recipe)


def _resident_batches(pictures: Tensor, recipe: Recipe) -> Iterator[tuple[int, Tensor]]:
    # a tensor: if the divisor is a number, CUDA multiplies by its reciprocal, which rounds differently
    full_scale = torch.full((), 255.0, device=pictures.device)
    places = endless_order(len(pictures), recipe.seed)
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 1, step])
        # integers(1) for the corner of the crop draws nothing, so these are the numbers that `segment` would draw
        mirrored = rng.random(recipe.batch_size) < 0.5
        order = np.stack([np.fromiter(itertools.islice(places, recipe.batch_size), np.int64), mirrored])
        chosen, mirror = torch.from_numpy(order).to(pictures.device, non_blocking=True)
        batch = pictures.index_select(0, chosen)
        batch = torch.where(mirror.bool()[:, None, None, None], batch.flip(2), batch)
        yield step, batch.permute(0, 3, 1, 2).float() / full_scale


def endless_order(count: int, seed: int) -> Iterator[int]:
    """Positions of samples: each epoch is a new permutation, which depends on the seed alone."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, 0, epoch]).permutation(count).tolist()
        epoch += 1
