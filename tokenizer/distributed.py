"""Collective operations for quantizers. In a single process each one is the identity."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    """Number of ranks that train together; 1 outside torch.distributed. Never cached."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def mean_across_ranks(x: Tensor) -> Tensor:
    """Mean of x over the ranks, with gradient to every rank's x."""
    ranks = world_size()
    return x if ranks == 1 else all_reduce(x) / ranks


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [N, ...] -> [ranks * N, ...]. N must be the same on all ranks. No gradient."""
    ranks = world_size()
    if ranks == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def from_first_rank(x: Tensor) -> Tensor:
    """Rank 0's x on every rank. Shapes must be equal on all ranks. No gradient."""
    x = x.detach().contiguous()
    if world_size() > 1:
        torch.distributed.broadcast(x, src=0)
    return x
