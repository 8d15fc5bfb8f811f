"""FIFO of recent latents that knows how far it is filled, lives in state_dict and can be pickled."""

import torch
from torch import Tensor, nn


class LatentQueue(nn.Module):
    """The last `capacity` latents [capacity, dim]. New ones wait in a side buffer and enter `flush` at a time.

    Between two flushes `samples` does not change, so that an index built over it stays exact; and because the
    waiting ones are state too, a run that is resumed asks the same queue as one that never stopped.
    """

    samples: Tensor
    filled: Tensor
    head: Tensor
    waiting: Tensor
    num_waiting: Tensor

    def __init__(self, capacity: int, dim: int, flush: int):
        super().__init__()
        self.capacity, self.flush = capacity, max(1, flush)
        self.register_buffer("samples", torch.zeros(capacity, dim))
        self.register_buffer("filled", torch.tensor(0))
        self.register_buffer("head", torch.tensor(0))
        self.register_buffer("waiting", torch.zeros(self.flush, dim))
        self.register_buffer("num_waiting", torch.tensor(0))

    @property
    def full(self) -> bool:
        return int(self.filled) == self.capacity

    @property
    def filled_share(self) -> Tensor:
        return self.filled / self.capacity

    @torch.no_grad()
    def add(self, latents: Tensor) -> bool:
        """Appends latents [n, dim]; returns whether `samples` changed. Of more than capacity, the last remain."""
        if not self.full:  # nothing is built over an unfilled queue: no need to wait
            self._append(latents)
            return len(latents) > 0
        total = int(self.num_waiting) + len(latents)
        if total < self.flush:
            self.waiting[int(self.num_waiting) : total] = latents
            self.num_waiting.fill_(total)
            return False
        self._append(torch.cat([self.waiting[: int(self.num_waiting)], latents]))
        self.num_waiting.zero_()
        return True

    def _append(self, latents: Tensor) -> None:
        latents = latents[-self.capacity :]
        where = (int(self.head) + torch.arange(len(latents), device=latents.device)) % self.capacity
        self.samples[where] = latents.to(self.samples.dtype)
        self.head.fill_((int(self.head) + len(latents)) % self.capacity)
        self.filled.fill_(min(self.capacity, int(self.filled) + len(latents)))
