"""Gradient cache: a batch larger than memory holds, with the loss and the gradient of the whole batch (Gao et al.,
2101.06983; the accumulation of BASIC, 2111.10050, and of open_clip's --accum-freq).

A loss that compares samples needs the features of all, but their activations only some at a time:

    1. every micro-batch passes the towers without gradients; its features are kept, and the state of the random numbers
    2. the objectives make the loss of all features, and its gradient dL/d(features)
    3. every micro-batch passes once more, with the random numbers of the first time and with gradients, and
       dL/d(features) flows back through it into the weights

The towers' work is four thirds of the plain step's, and their memory that of one micro-batch, beside the features. What an
objective does with the features (a decoder, the heads of experts) it does for the whole batch. Batch norms normalise over a
micro-batch (as over each process's pictures otherwise), and their averages move by the mean of its micro-batches once a step.

Objectives that pass the tower themselves (`Objective.own_passes`: crops, masked patches) compare no samples: their loss
is a mean over pictures, and they are given one micro-batch after the other, without texts and columns. What they log of
a batch as a whole (how its features spread, the entropy of its mean assignment) is then the mean over micro-batches, and lower.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cutline.objectives.base import Batch, Features, Tower
from cutline.objectives.gather import world


class Cached(Features):
    """Features whose passes are made some rows at a time; call `backward` when the loss has had its own."""

    rows: int

    def __init__(self, model: Any, batch: Batch, encoder: Any, rows: int, precision: "Precision") -> None:
        super().__init__(model, batch, encoder)
        self.rows = rows
        self.precision = precision
        self._passes: list[tuple[Tower, Sequence[Tensor], list[Any], dict[str, Tensor]]] = []

    def run(self, tower: Tower, inputs: Tensor) -> dict[str, Tensor]:
        parts, states, found = torch.split(inputs, self.rows), [], []
        # Batch norms' numbers alone: the second pass moves them, and to write others would break graphs that have read them.
        norms = _buffers(self.model, "running_mean", "running_var", "num_batches_tracked")
        before = [b.clone() for b in norms]
        with torch.no_grad(), self.precision():
            for part in parts:
                states.append(_random_state(inputs.device))
                found.append(tower(part))
        _copy(norms, before)
        leaves = {what: torch.cat([f[what] for f in found]).requires_grad_() for what in found[0]}
        self._passes.append((tower, parts, states, leaves))
        return leaves

    def backward(self) -> None:
        """Let the gradients that the features have got flow on into the towers."""
        for tower, parts, states, leaves in self._passes:
            given = {what: torch.split(leaf.grad, self.rows) for what, leaf in leaves.items() if leaf.grad is not None}
            averages = _buffers(self.model, "running_mean", "running_var")
            start, moved = ([x.clone() for x in averages] for _ in range(2))
            for i, (part, state) in enumerate(zip(parts, states, strict=True) if given else ()):
                _copy(averages, start)
                with _replayed(state, part.device), self.precision():
                    found = tower(part)
                torch.autograd.backward([found[what] for what in given], [g[i] for g in given.values()])
                for total, now, before in zip(moved, averages, start, strict=True):
                    total += (now - before) / len(parts)
            _copy(averages, moved)


Precision = Callable[[], AbstractContextManager[Any]]  # of a forward pass, such as bf16 autocast


def backward(trainee: Any, batch: Batch, rows: int, precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
    """As `Trainee.forward` and the loss's backward pass, with at most `rows` pictures or texts of this process at a time.

    The weights' gradients are those of all processes' joined batch, without a wrapper such as DDP.
    """
    methods = trainee.methods()
    if world()[1] > 1:
        for buffer in trainee.buffers():
            dist.broadcast(buffer, 0)  # as DDP does: batch norms' averages are those of the first process
    features = Cached(trainee.model, batch, trainee.encoder, rows, precision)
    with precision():
        loss, log = trainee.losses([n for n, o in methods.items() if not o.own_passes], batch, features)
    if loss.requires_grad:
        loss.backward()
    features.backward()
    total = loss.detach()
    own = [n for n, o in methods.items() if o.own_passes]
    logged: dict[str, list[tuple[float, Tensor]]] = {}
    for part, share in micro_batches(batch, rows) if own else ():
        with precision():
            loss, found = trainee.losses(own, part, Features(trainee.model, part))
        (share * loss).backward()
        total = total + share * loss.detach()
        for name, value in found.items():
            logged.setdefault(name, []).append((share, value))
    # A number that a part does not have is the mean over those that do.
    log |= {n: torch.stack([s * v for s, v in x]).sum() / sum(s for s, _ in x) for n, x in logged.items()}
    for name in own:  # by which they judge, after the step, whether training has collapsed
        methods[name].logged = {k.removeprefix(f"{name}/"): v for k, v in log.items() if k.startswith(f"{name}/")}
    average_gradients(trainee)
    return total, log


def micro_batches(batch: Batch, rows: int) -> Iterator[tuple[Batch, float]]:
    """The pictures of `batch`, at most `rows` at a time and without texts and columns, and their share of all."""
    pictures = len(batch.views["image"])
    parts = {name: torch.split(x, rows * (len(x) // pictures)) for name, x in batch.views.items()}
    for i in range(len(parts["image"])):
        views = {name: split[i] for name, split in parts.items()}
        yield Batch(views, {}, {}, batch.keys[i * rows : (i + 1) * rows]), len(views["image"]) / pictures


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """The mean over processes of every gradient, in place, as DDP would; a weight that no process used keeps none."""
    if world()[1] == 1:
        return
    weights = [p for p in module.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in weights], dtype=torch.uint8, device=weights[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for p in (p for p, is_used in zip(weights, used.tolist(), strict=True) if is_used):
        mean = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()  # convolutions' may be channels-last
        dist.all_reduce(mean)
        p.grad = torch.zeros_like(p).copy_(mean / world()[1])


def _copy(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)


def _buffers(model: nn.Module, *names: str) -> list[Tensor]:
    return [b for n, b in model.named_buffers() if n.endswith(names)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers as they were then, and afterwards as if none had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
