"""The learning rate by a sweep, without which encoders are compared at rates that suit some of them. In Python:

    result = sweep("segment", "runs/mine", "folder:pictures", SegmentConfig(split="test"), rates=[1e-4, 3e-4])

Every rate is tried and judged by validation: by the split "val" where "test" is scored, and else on a tenth of the
training pictures, held out. With the best one training starts once more on all of them, and that model is scored.
"""

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cutline.errors import ConfigError, DataError, DivergedError, TrainingError
from cutline.objectives.gather import barrier, world
from cutline.record import HEADLINE, Result, fingerprint
from cutline.train.device import process_group
from cutline.transfer.data import DenseData, Task, labelled, open_data
from cutline.transfer.options import TransferConfig
from cutline.transfer.prepared import encoder_of
from cutline.transfer.run import finished, transfer

FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0)  # of the config's rate, when no rates are given
HELD_OUT = 0.1


def sweep(
    task: Task,
    encoder: Any,
    data: str | DenseData,
    config: TransferConfig,
    out: Path | None = None,
    rates: Sequence[float] = (),
    resume: bool = False,
) -> Result:
    """The result of the best of `rates` (default `FACTORS` times the config's own), as `segment` and its like give it.

    Its protocol says which rates were tried in place of the one chosen, so that encoders with different ones share a column.
    `out` gets what a run writes, sweep.png, and the trials in sweep/. resume: what is finished is not run again, and what was
    killed goes on. A rate at which training diverges is told and passed over; raises `TrainingError` if all do.
    """
    if config.peak is None:
        raise ConfigError("head=knn trains nothing, so there is no learning rate to sweep.")
    rates = sorted(set(rates)) or [f * config.peak for f in FACTORS]
    if min(rates) <= 0:
        raise ConfigError(f"a learning rate must be above 0, not {min(rates)}.")
    opened = open_data(data, task)
    with process_group(config.device):
        start = encoder_of(encoder, config)
        judged, trial, by = _validation(opened, config)
        tried = f"best of {', '.join(f'{r:g}' for r in rates)} by {by}"
        if resume and out is not None and (out / "result.json").exists():
            result = finished(out, config, opened, start.hash, but=frozenset({"lr"}))
            found = result.protocol.settings["lr"]
            if found == tried:
                return result
            if isinstance(found, str):
                raise ConfigError(f"{out} holds another sweep: {found}. Choose another --out.")
            # Else the result is as training wrote it: the sweep was killed before it said what was tried.
        if out is not None and not resume and world()[0] == 0:
            shutil.rmtree(out / "sweep", ignore_errors=True)
        barrier()
        scores = {}
        for rate in rates:
            folder = out / "sweep" / f"lr-{rate:g}" if out is not None else None
            scores[rate] = _score(task, start, judged, trial.model_copy(update={"lr": rate}), folder, resume)
        best = _best(task, scores)
        if out is not None and world()[0] == 0:
            from cutline.transfer.draw import rate_curve

            rate_curve(out / "sweep.png", scores, best, HEADLINE[task][0], by)
        result = transfer(task, start, opened, config.model_copy(update={"lr": best}), out, resume)
        settings = {**result.protocol.settings, "lr": tried}
        result = result.model_copy(update={"protocol": result.protocol.model_copy(update={"settings": settings})})
        if out is not None and world()[0] == 0:
            result.write(out)
    return result


def parse_rates(text: str) -> list[float]:
    """The rates of "lr=1e-4,3e-4", none of "lr"; raises `ConfigError` for anything else."""
    name, _, values = text.partition("=")
    try:
        if name == "lr":
            return [float(v) for v in values.split(",")] if values else []
    except ValueError:
        pass
    raise ConfigError(f"--sweep {text!r} is neither lr nor a list of learning rates, such as lr=1e-4,3e-4,1e-3.")


def _validation(data: DenseData, config: TransferConfig) -> tuple[DenseData, TransferConfig, str]:
    """What the trials train on and are scored on (its "val"), their config, and how the protocol names the judge."""
    if config.split == "test" and "val" in data.splits:
        return data, config.model_copy(update={"split": "val"}), "val"
    train = data.split("train")
    rows = labelled(len(train), config.labels, config.seed, train.labels)
    if len(rows) < 3:
        raise DataError(f"{data.spec}: {len(rows)} training pictures are too few to hold some out for a sweep.")
    order = np.random.default_rng([config.seed, 0x5EE9]).permutation(rows)
    count = max(1, round(HELD_OUT * len(rows)))
    parts = {"val": train.part(sorted(order[:count].tolist())), "train": train.part(sorted(order[count:].tolist()))}
    held = replace(data, splits=parts, fingerprint=fingerprint(data.fingerprint, "held out", config.seed))
    return held, config.model_copy(update={"split": "val", "labels": None}), "a tenth of the training pictures"


def _score(
    task: Task, encoder: Any, data: DenseData, config: TransferConfig, folder: Path | None, resume: bool
) -> float:
    metric = HEADLINE[task][0]
    try:
        score = transfer(task, encoder, data, config, folder, resume).metrics[metric]
    except DivergedError as e:
        _say(f"lr={config.lr:g}: {e}")
        return math.nan
    _say(f"lr={config.lr:g}: {metric} {score:.4g}")
    return score


def _best(task: Task, scores: dict[float, float]) -> float:
    metric, _, more = HEADLINE[task]
    able = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not able:
        raise TrainingError(f"training failed at every learning rate, from {min(scores):g} on. Sweep smaller ones.")
    best = (max if more else min)(able, key=lambda r: able[r])
    _say(f"The best learning rate is {best:g} ({metric} {able[best]:.4g}).")
    if len(scores) > 1 and best in (min(scores), max(scores)):
        _say(f"It is the {'smallest' if best == min(scores) else 'largest'} tried: the best may lie beyond.")
    return best


def _say(line: str) -> None:
    if world()[0] == 0:
        print(line, file=sys.stderr, flush=True)
