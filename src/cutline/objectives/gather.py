"""Features of all processes, with gradients, so that a loss per process averages to the loss of the joined batch."""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(x: Tensor) -> Tensor:
    """Concatenate `x` (n, …) of every process in rank order, gradients flowing back to each; n must be equal on all.

    The backward pass sums over processes what each needs of `x`. With DDP's averaging this gives exactly the gradient
    of the mean over processes of their losses (`local loss, gather with grad` of open_clip's ClipLoss).
    """
    if world()[1] == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))  # type: ignore[no-untyped-call]


def gather_plain(x: Tensor) -> Tensor:
    """Concatenate `x` of every process without gradients (for labels and owners)."""
    if world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
