"""A loss over all pairs without the matrix of all pairs: some rows at a time, each chunk's gradient taken at once.

A pairwise loss is a sum over its rows, L = Σ_i f(row i, all columns). The logits of a chunk of rows, chunk × M, are made,
give the chunk's part of L and of dL/d(inputs), and are forgotten. What is kept for the backward pass is dL/d(inputs)
alone, as large as the inputs, so memory is linear in the batch; and as nothing is computed twice, the matrix products
are those of the plain form. A row sees all of its columns in one chunk, so that a softmax over them needs no running
sums, and every loss can be written as for one matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rows = Callable[..., tuple[Tensor, Tensor]]


def chunked(f: Rows, chunk: int | None, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums over chunks of both values of `f(*rows, *columns)`: a loss, and a number that is only logged.

    rows: tensors of equal length n, of which `f` sees `chunk` entries at a time; columns: those it sees whole (all that
    gets a gradient must be among the two). None, or chunk ≥ n: `f` itself, in one piece.
    """
    if chunk is None or chunk >= len(rows[0]):
        return f(*rows, *columns)
    loss, logged = _Chunked.apply(f, chunk, len(rows), *rows, *columns)
    return loss, logged


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Rows, chunk: int, n_rows: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        needed = [i for i in range(len(inputs)) if ctx.needs_input_grad[3 + i]]
        grads = {i: torch.zeros_like(inputs[i]) for i in needed}
        total = seen = torch.zeros(())
        for start in range(0, len(inputs[0]), chunk):
            part = slice(start, start + chunk)
            leaves = [x[part] if i < n_rows else x for i, x in enumerate(inputs)]
            leaves = [x.detach().requires_grad_(i in grads) for i, x in enumerate(leaves)]
            with torch.enable_grad():
                loss, logged = f(*leaves)
            # Into one number: small tensors kept from every chunk would keep the memory around them from being used again.
            total, seen = (loss.detach(), logged.detach()) if start == 0 else (total + loss.detach(), seen + logged)
            found = torch.autograd.grad(loss, [leaves[i] for i in needed]) if needed else ()
            for i, grad in zip(needed, found, strict=True):
                if i < n_rows:
                    grads[i][part] = grad
                else:
                    grads[i] += grad
            del loss, found  # before the next chunk's logits
        ctx.save_for_backward(*grads.values())
        ctx.needed, ctx.count = needed, len(inputs)
        ctx.mark_non_differentiable(seen)
        return total, seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * ctx.count
        for i, saved in zip(ctx.needed, ctx.saved_tensors, strict=True):
            found[i] = saved * grad.to(saved.dtype)
        return (None, None, None, *found)
