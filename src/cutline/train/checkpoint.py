"""Checkpoints: everything a run needs to go on to the bit, written atomically (a folder renamed into place), pruned.

Written by `torch.distributed.checkpoint`, so the same code serves one process and many, replicated or sharded.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, around what failed on each rank
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from cutline.errors import TrainingError
from cutline.objectives.gather import world

NAME = re.compile(r"^step-(\d{8})$")


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.match(p.name) and (p / ".metadata").exists())


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (nested dicts of tensors and plain values) as `folder/step-…` and keep the newest `keep`."""
    rank, size = world()
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    if size > 1:
        dist.barrier()
    try:
        with _quiet():
            dcp.save(  # type: ignore[attr-defined]
                state, checkpoint_id=str(temporary), no_dist=size == 1
            )
    except (OSError, CheckpointException) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"cannot write checkpoint {final}: {_reason(e)}. Earlier checkpoints are whole; make room and start again with --resume."
        ) from e
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in saved(folder)[:-keep]:
            shutil.rmtree(old)
        for stale in folder.glob(".step-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    if size > 1:
        dist.barrier()
    return final


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place: tensors are overwritten, plain values replaced. Raises `TrainingError` if it does not fit.

    A parameter that never had a gradient (the logit bias of a SigLIP tower under a contrastive loss) has no state of the
    optimiser in the checkpoint; it is dropped from `state`. So are the generators of processes and devices that it was
    not written with: these begin anew.
    """
    try:
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        moments = state.get("optimiser", {}).get("state", {})
        for name in [n for n in moments if f"optimiser.state.{n}.step" not in known]:
            del moments[name]
        generators = state.get("rng", {})
        for name in [n for n in generators if f"rng.{n}" not in known]:
            del generators[name]
        with _quiet():
            dcp.load(  # type: ignore[attr-defined]
                state, checkpoint_id=str(path), no_dist=world()[1] == 1
            )
    except (Exception, CheckpointException) as e:
        raise TrainingError(
            f"checkpoint {path} does not fit this run ({_reason(e)}). Resume with the recipe it was made with, or choose another --out."
        ) from e


def training_state(
    module: nn.Module, optimiser: torch.optim.Optimizer, average: AveragedModel | None, **more: Any
) -> dict[str, Any]:
    """What the next step of a training loop depends on: weights, moments, random numbers, the weights' average, and `more`.

    Tensors are the live ones: `load` fills them in place.
    """
    state = {
        "trainee": module.state_dict(),
        "optimiser": get_optimizer_state_dict(module, optimiser),
        "rng": rng_state(),
        **more,
    }
    return state if average is None else {**state, "average": average.state_dict()}


def restore(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: AveragedModel | None, **more: Any
) -> dict[str, Any]:
    """Go back to the `training_state` in the checkpoint `path`; returns it, with its `more`."""
    state = training_state(module, optimiser, average, **more)
    load(path, state)
    module.load_state_dict(state["trainee"])
    set_optimizer_state_dict(module, optimiser, state["optimiser"], options=StateDictOptions(strict=False))
    if average is not None:
        average.load_state_dict(state["average"])
    set_rng_state(state["rng"])
    return state


def _reason(e: BaseException) -> BaseException:
    """What failed on the first rank that failed, without its traceback."""
    return next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves alone, which is what `no_dist` says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def rng_state() -> dict[str, torch.Tensor]:
    """States of the generators that dropout and drop path draw from, for this process."""
    states = {f"cpu{world()[0]}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda{world()[0]}"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Set those that there are states for."""
    if (state := states.get(f"cpu{world()[0]}")) is not None:
        torch.set_rng_state(state)
    if torch.cuda.is_available() and (state := states.get(f"cuda{world()[0]}")) is not None:
        torch.cuda.set_rng_state(state)
