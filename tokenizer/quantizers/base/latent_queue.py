"""FIFO queue of recent latents. It is part of state_dict and can be pickled."""

import torch
from torch import Tensor, nn


class LatentQueue(nn.Module):
    """The last `capacity` latents [capacity, dim]. New latents first wait in a buffer; a full buffer of `flush`
    latents enters the queue at once.

    Between two flushes `samples` does not change, so an index over it stays exact. The waiting latents are saved too,
    so a resumed run has the same queue as one that never stopped.
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
        """Appends latents [n, dim] and returns whether `samples` changed. Keeps the last `capacity` of them."""
        if not self.full:  # there is no index over a queue that is not full, so nothing needs to wait
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
        rows = (int(self.head) + torch.arange(len(latents), device=latents.device)) % self.capacity
        self.samples[rows] = latents.to(self.samples.dtype)
        self.head.fill_((int(self.head) + len(latents)) % self.capacity)
        self.filled.fill_(min(self.capacity, int(self.filled) + len(latents)))
