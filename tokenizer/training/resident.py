"""Training batches from pictures that all stay on the device.

Cropping pictures one by one in Python takes longer than the training step on a GPU.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer.training.recipe import Recipe


def resident_batches(
    pictures: Sequence[np.ndarray], recipe: Recipe, factor: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yields (step, x), x [B, 3, S, S] float32 on the device: the same batches as `training_batches`, to the bit.

    pictures: one uint8 array [N, S, S, 3]. Raises ValueError unless S equals recipe.segment and is a multiple of
    factor. Then each crop is the whole picture, and only mirroring is random. Never waits for the device.
    """
    side = recipe.segment
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.shape[1:] != (side, side, 3):
        raise ValueError(
            f"to keep the training pictures on the device, pass one uint8 array [N, {side}, {side}, 3], "
            f"since train.crop_size is {side}"
        )
    if side % factor:
        raise ValueError(f"train.crop_size is {side}; it must be a multiple of the net's factor, {factor}")
    return _resident_batches(torch.tensor(pictures, device=device), recipe)


def _resident_batches(pictures: Tensor, recipe: Recipe) -> Iterator[tuple[int, Tensor]]:
    # a tensor, because CUDA multiplies by the reciprocal of a plain number, which rounds differently
    full_scale = torch.full((), 255.0, device=pictures.device)
    places = endless_order(len(pictures), recipe.seed)
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 1, step])
        # `segment` also calls integers(1) for the crop's corner, which draws nothing: the random numbers are the same
        mirrored = rng.random(recipe.batch_size) < 0.5
        order = np.stack([np.fromiter(itertools.islice(places, recipe.batch_size), np.int64), mirrored])
        positions, mirror = torch.from_numpy(order).to(pictures.device, non_blocking=True)
        batch = pictures.index_select(0, positions)
        batch = torch.where(mirror.bool()[:, None, None, None], batch.flip(2), batch)
        yield step, batch.permute(0, 3, 1, 2).float() / full_scale


def endless_order(count: int, seed: int) -> Iterator[int]:
    """Positions of samples without end: a new permutation for each epoch, which depends only on the seed."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, 0, epoch]).permutation(count).tolist()
        epoch += 1
