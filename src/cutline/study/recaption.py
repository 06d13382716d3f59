"""A study's table with captions of our own: scenes, a few good captions, a captioner that learns from them, and what it
writes for every row. Each part is done once, and a killed one goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cutline.captions.captioner import CaptionerConfig, train_captioner
from cutline.captions.coca import CocaWriter
from cutline.captions.engine import RunConfig, run
from cutline.captions.rules import RulesFuse
from cutline.config import check
from cutline.pairs import Pairs, Provenance
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.study.plan import OURS, Recaption
from cutline.train.stream.order import draws, key

HUMAN, FUSED = "caption_human", "caption_fused"


def recaption(plan: Recaption, out: Path, say: Callable[[str], None]) -> Pairs:
    """Make `out/pairs.lance` with `caption_human`, `caption_ours` and, if asked, `caption_fused`; the captioner is in
    `out/captioner`."""
    pairs = _table(plan, out)
    if HUMAN not in pairs.columns:
        pairs = pairs.add_column(
            HUMAN, lambda rows: [_given(row, plan.share) for row in rows], columns=["key", "captions"], type="list<string>",
            provenance=Provenance(how="share of the rows", inputs=["captions"], settings={"share": plan.share}), show=False,
        )  # fmt: skip
    if OURS not in pairs.columns:
        captioner = out / "captioner"
        train_captioner(pairs, HUMAN, captioner, check(CaptionerConfig, plan.captioner), resume=True)
        pairs, report = run(
            pairs,
            CocaWriter(str(captioner), OURS, **plan.write),
            OURS,
            RunConfig(batch=256),
            say=say,
        )
        say(f"captions of our own for {report.rows - report.bad:,} of {report.rows:,} pictures")
    if plan.fused and FUSED not in pairs.columns:
        pairs, _ = run(
            pairs, RulesFuse(inputs=["alt", OURS], column=FUSED), FUSED, RunConfig(batch=1024, max_bad=1), say=say
        )
    return pairs


def _table(plan: Recaption, out: Path) -> Pairs:
    path = out / "pairs.lance"
    if not path.exists():
        aside = out / ".pairs.lance"
        shutil.rmtree(aside, ignore_errors=True)
        write_pairs(parse_spec(plan.scenes), aside)
        aside.rename(path)  # there is a table when, and only when, it is whole
    return Pairs.open(path)


def _given(row: dict[str, list[str]], share: float) -> list[str] | None:
    """The captions of a row that is among the share of good ones."""
    return row["captions"] if draws(key(str(row["key"])), 0, 0, "good")() < share else None
