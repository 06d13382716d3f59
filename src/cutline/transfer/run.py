"""A whole transfer: train, save, score, draw, record; the same for every task."""

import importlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cutline.errors import ConfigError
from cutline.objectives.gather import world
from cutline.record import Result
from cutline.train.device import process_group
from cutline.transfer.data import DenseData, Task
from cutline.transfer.model import Transferred
from cutline.transfer.options import TransferConfig
from cutline.transfer.store import save

M = TypeVar("M", bound=Transferred)


def config_of(task: Task) -> type[TransferConfig]:
    """The task's config class."""
    module = importlib.import_module(f"cutline.transfer.{task}")
    kind: type[TransferConfig] = getattr(module, f"{task.capitalize()}Config")
    return kind


def transfer(
    task: Task,
    encoder: Any,
    data: str | DenseData,
    config: TransferConfig,
    out: Path | None = None,
    resume: bool = False,
) -> Result:
    """`segment`, `depth`, `classify` or `detect` by its name, with its config. Raises `ConfigError` where there is nothing to
    resume, because `out` holds a finished run."""
    if resume and out is not None and (out / "result.json").exists():
        raise ConfigError(
            f"the run in {out} is finished. Leave --resume out to train it anew, or choose another --out."
        )
    run = getattr(importlib.import_module(f"cutline.transfer.{task}"), task)
    result: Result = run(encoder, data, config, out, resume)
    return result


def run(
    device: str, fit: Callable[[], M], score: Callable[[M], Result], draw: Callable[[M, Path], None], out: Path | None
) -> Result:
    """`fit`, then `score`, on all processes of torchrun, each with its share of the work and with the same result.

    With `out`, the first writes there the model, metrics.jsonl, samples.png (by `draw`) and result.json, and takes the
    checkpoints away. The result's seconds are those of training and scoring.
    """
    begun = time.monotonic()
    with process_group(device):
        model, first = fit(), world()[0] == 0
        if out is not None and first:
            save(model, out / "model")  # before scoring, which bad pictures may stop
        result = score(model).model_copy(update={"seconds": time.monotonic() - begun})
        if out is not None and first:
            draw(model, out / "samples.png")
            result.write(out)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return result
