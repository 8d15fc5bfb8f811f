"""Exponential moving averages of a model's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tokenizer.autoencoder import Autoencoder


class EMA:
    """Averages of every float tensor that is saved with a model: weights, and buffers such as codes and scales."""

    def __init__(self, autoencoder: Autoencoder, decay: float):
        self.autoencoder, self.decay = autoencoder, decay
        self.values = {name: tensor.clone() for name, tensor in self._current().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after each training step; step counts from 0.

        The decay starts lower than `decay`, so that the random initial weights fade quickly.
        """
        decay = min(self.decay, step / (step + 10))
        for name, tensor in self._current().items():
            self.values[name].lerp_(tensor, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the autoencoder has the averaged weights."""
        before = {name: tensor.clone() for name, tensor in self._current().items()}
        try:
            self._load(self.values)
            yield
        finally:
            self._load(before)

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._current().items():
            tensor.copy_(values[name])

    def _current(self) -> dict[str, Tensor]:
        state = self.autoencoder.inference_state()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
