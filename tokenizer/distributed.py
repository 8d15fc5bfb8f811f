"""The collective operations that quantizers need. Each is the identity in a single process."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    """Ranks that train together; 1 outside of torch.distributed. Asked anew each time, never cached."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def mean_across_ranks(x: Tensor) -> Tensor:
    """Mean of x over the ranks, with gradient to every rank's x."""
    ranks = world_size()
    return x if ranks == 1 else all_reduce(x) / ranks


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [N, ...] -> [ranks * N, ...]. Every rank must bring the same N. No gradient."""
    ranks = world_size()
    if ranks == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def from_first_rank(x: Tensor) -> Tensor:
    """Rank 0's x on every rank; all bring the same shape. No gradient."""
    x = x.detach().contiguous()
    if world_size() > 1:
        torch.distributed.broadcast(x, src=0)
    return x
