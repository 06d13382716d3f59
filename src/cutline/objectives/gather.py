"""Features of all processes, with gradients, so that a loss per process averages to the loss of the joined batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cutline.errors import CutlineError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        dist.barrier()


def same_on_all(value: T) -> T:
    """What the first process has, on all of them; any picklable object."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def broadcast(x: Tensor) -> None:
    """Overwrite `x` with the first process's."""
    if world()[1] > 1:
        dist.broadcast(x, 0)


def of_all(value: T) -> list[T]:
    """What each process has, in rank order; any picklable object."""
    if world()[1] == 1:
        return [value]
    found: list[T | None] = [None] * world()[1]
    dist.all_gather_object(found, value)
    return [v for v in found if v is not None]


def own_share(count: int, each: int = 1) -> range:
    """The places of this process's share of `count`: shares are consecutive, and of whole groups of `each` (but for the last of
    all), so that batches of that size hold what they hold in one process."""
    rank, size = world()
    groups = -(-count // each)
    first, stop = (min(count, groups * r // size * each) for r in (rank, rank + 1))
    return range(first, stop)


@contextmanager
def together() -> Iterator[None]:
    """The body is this process's part of what all do, without a word to the others; what it raises on one process is raised on
    all at its end, so that none waits for one that is gone."""
    if world()[1] == 1:
        yield
        return
    problem: Exception | None = None
    try:
        yield
    except Exception as e:
        problem = e
    told = problem if problem is None or isinstance(problem, CutlineError) else f"{type(problem).__name__}: {problem}"
    problems = [found for (found,) in of_all((told,)) if found is not None]
    if problem is not None:
        raise problem
    if problems:
        raise problems[0] if isinstance(problems[0], CutlineError) else CutlineError(problems[0])


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


def total(n: Tensor) -> Tensor:
    """Sum of a count over processes, at least 1."""
    n = n.clone()
    if world()[1] > 1:
        dist.all_reduce(n)
    return n.clamp(min=1)


@dataclass(frozen=True)
class Pairing:
    """Which picture each text belongs to, over all processes, which may hold different numbers of texts.

    owners (M,): rows of the joined batch; texts (B,): how many each of its pictures has; counts: texts of each process;
    own: the place of this process's among the M.
    """

    owners: Tensor
    texts: Tensor
    counts: list[int]
    own: slice

    @property
    def share(self) -> Tensor:
        """(M,) float64: weights that sum to 1; pictures that have texts count the same, their texts share it equally."""
        return 1 / (self.texts[self.owners] * (self.texts > 0).sum()).double()

    def gather(self, x: Tensor) -> Tensor:
        """(m, …) of this process's texts → (M, …); with gradients if `x` has them."""
        return gather_uneven(x, self.counts)


def pair(owners: Tensor, pictures: int, paired: bool) -> Pairing:
    """The pairing of the joined batch, from this process's `owners` (m,) among its `pictures`; paired as in `Texts`."""
    rank, size = world()
    counts = [len(owners)] * size
    if size > 1 and not paired:
        counts = gather_plain(torch.tensor([len(owners)], device=owners.device)).tolist()
    joined = gather_uneven(owners + rank * pictures, counts)
    texts = torch.zeros(size * pictures, dtype=torch.long, device=owners.device)
    texts = texts.scatter_add(0, joined, torch.ones_like(joined))
    return Pairing(joined, texts, counts, slice(sum(counts[:rank]), sum(counts[: rank + 1])))


def gather_uneven(x: Tensor, counts: list[int]) -> Tensor:
    """Concatenate `x` (counts[rank], …) of every process in rank order; with gradients if `x` has them."""
    if world()[1] == 1:
        return x
    most = max(counts)
    padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x)))
    parts = torch.split((gather if x.requires_grad else gather_plain)(padded), most)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
