"""A whole transfer: train, save, score, draw, record; the same for every task."""

import importlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cutline.errors import ConfigError
from cutline.objectives.gather import barrier, world
from cutline.record import Result
from cutline.train.device import process_group
from cutline.transfer.data import DenseData, Task, open_data
from cutline.transfer.model import Transferred
from cutline.transfer.options import NO_NUMBER, TransferConfig, precision
from cutline.transfer.prepared import encoder_of
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
    """`segment`, `depth`, `classify` or `detect` by its name, with its config; where a finished run is to be resumed, its
    result. Raises `ConfigError` if that is of another config, encoder or data."""
    if resume and out is not None and (out / "result.json").exists():
        data, encoder = open_data(data, task), encoder_of(encoder, config)
        return finished(out, config, data, encoder.hash)
    run = getattr(importlib.import_module(f"cutline.transfer.{task}"), task)
    result: Result = run(encoder, data, config, out, resume)
    return result


def finished(
    out: Path, config: TransferConfig, data: DenseData, encoder_hash: str, but: frozenset[str] = frozenset()
) -> Result:
    """The result in `out`; raises `ConfigError` if it is not of this config (whatever the options `but` are), data and encoder."""
    result = Result.read(out)
    found = result.protocol
    given = config.model_dump(mode="json", exclude={"seed", "split", *NO_NUMBER, *but}, exclude_none=True)
    given["precision"] = precision(config)
    same = [found.settings.get(name) for name in given] == list(given.values()) and (
        (found.data_fingerprint, found.encoder_hash, found.split, found.seed)
        == (data.fingerprint, encoder_hash, config.split, config.seed)
    )
    if not same:
        raise ConfigError(
            f"{out} holds a finished run of another config, encoder or data. Choose another --out, or leave --resume out to "
            "train it anew."
        )
    return result


def run(
    fit: Callable[[Any, DenseData, Any, Path | None, bool], M],
    score: Callable[[M, DenseData], Result],
    draw: Callable[[M, Path], None],
    encoder: Any,
    data: DenseData,
    config: TransferConfig,
    out: Path | None,
    resume: bool,
) -> Result:
    """`fit`, then `score`, on all processes of torchrun, each with its share of the work and with the same result.

    With `out`, the first writes there the model, metrics.jsonl, samples.png (by `draw`) and result.json, and takes the
    checkpoints away. Without `resume`, what an earlier run left there goes first. The result's seconds are those of training
    and scoring.
    """
    begun = time.monotonic()
    with process_group(config.device):
        first = world()[0] == 0
        if out is not None and first and not resume:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            for name in ("result.json", "metrics.jsonl"):
                (out / name).unlink(missing_ok=True)
        barrier()
        model = fit(encoder, data, config, out, resume)
        if out is not None and first:
            save(model, out / "model")  # before scoring, which bad pictures may stop
        result = score(model, data).model_copy(update={"seconds": time.monotonic() - begun})
        if out is not None and first:
            draw(model, out / "samples.png")
            result.write(out)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return result
