"""A whole transfer: train, save, score, draw, record; the same for every task."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cutline.record import Result
from cutline.transfer.model import Transferred
from cutline.transfer.store import save

M = TypeVar("M", bound=Transferred)


def run(
    fit: Callable[[], M], score: Callable[[M], Result], draw: Callable[[M, Path], None], out: Path | None
) -> Result:
    """`fit`, then `score`; with `out`, write there the model, metrics.jsonl, samples.png (by `draw`) and result.json.

    The result's seconds are those of training and scoring.
    """
    begun = time.monotonic()
    model = fit()
    if out is not None:
        save(model, out / "model")  # before scoring, which bad pictures may stop
    result = score(model).model_copy(update={"seconds": time.monotonic() - begun})
    if out is not None:
        draw(model, out / "samples.png")
        result.write(out)
    return result
