"""The table of a suite: a row for each data set, a column for each model, averages by group and over all; as JSON, CSV,
Markdown and a drawing."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cutline.errors import ConfigError
from cutline.record import HEADLINE, Result, write_atomic
from cutline.transfer.draw import palette, write
from cutline.zeroshot.suite import Suite, folder_of

FIELDS = ("model", "name", "group", "task", "metric", "value", "chance", "scored", "of")


@dataclass
class Score:
    """One cell: value and chance (None where there is none) in the unit of the metric, shares in per cent; scored: of how
    many data sets it is the mean, `of` those that belong to it."""

    model: str
    name: str
    group: str
    task: str
    metric: str = ""
    value: float | None = None
    chance: float | None = None
    scored: int = 0
    of: int = 1
    share: bool = True  # in per cent and the more the better; others are in no average

    @property
    def text(self) -> str:
        if self.value is None:
            return "–"
        return f"{self.value:.1f}" + (f" ({self.scored} of {self.of})" if self.scored < self.of else "")


@dataclass
class Table:
    """rows: scores by data set, then averages, each with one for every model."""

    suite: str
    models: list[str]
    rows: list[list[Score]] = field(default_factory=list)

    def header(self) -> list[str]:
        return ["data", "group", "metric", "chance", *self.models]

    def lines(self) -> list[list[str]]:
        """The table as text, after `header`."""
        out = []
        for row in self.rows:
            known = next((s for s in row if s.metric), row[0])
            chance = next((f"{s.chance:.1f}" for s in row if s.chance is not None), "")
            out.append([known.name, known.group, known.metric, chance, *(s.text for s in row)])
        return out


def table(suite: Suite, models: Sequence[str], out: Path) -> Table:
    """What is there of a suite in `out`. Raises `ConfigError` for a metric that a result does not have."""
    made = Table(suite.name, list(models))
    rows = [[_score(suite, model, name, out) for model in models] for name in suite.tasks]
    groups = list(dict.fromkeys(e.group for e in suite.tasks.values() if e.group))
    made.rows += rows
    for group in groups if len(groups) > 1 else []:
        made.rows.append(_average([row for row in rows if row[0].group == group], f"mean of {group}", group))
    made.rows.append(_average(rows, "mean of all", ""))
    return made


def _score(suite: Suite, model: str, name: str, out: Path) -> Score:
    entry, folder = suite.tasks[name], folder_of(out, model, name)
    score = Score(model, name, entry.group, entry.task)
    if not (folder / "result.json").exists():
        return score
    result = Result.read(folder)
    own, factor, _ = HEADLINE[result.protocol.task]
    metrics = [entry.metric] if isinstance(entry.metric, str) else entry.metric or [own]
    for metric in metrics:
        if metric not in result.metrics:
            raise ConfigError(f"{name}: there is no metric {metric!r}; there are {', '.join(result.metrics)}.")
    score.share = factor == 100.0 or all(m.startswith("delta") for m in metrics)
    unit = 100.0 if score.share else 1.0
    score.metric, score.scored = ", ".join(metrics), 1
    score.value = unit * fmean(result.metrics[m] for m in metrics)
    if all(f"chance_{m}" in result.metrics for m in metrics):
        score.chance = unit * fmean(result.metrics[f"chance_{m}"] for m in metrics)
    return score


def _average(rows: Sequence[Sequence[Score]], name: str, group: str) -> list[Score]:
    """The mean of each model over the data sets whose scores are shares; its chance where all have one."""
    counted = [row for row in rows if all(s.share for s in row)]
    found = []
    for column in zip(*counted):
        values = [s.value for s in column if s.value is not None]
        chances = [s.chance for s in column if s.chance is not None]
        chance = fmean(chances) if chances and len(chances) == len(values) else None
        mean = fmean(values) if values else None
        found.append(Score(column[0].model, name, group, "mean", "", mean, chance, len(values), len(column)))
    return found or [Score(s.model, name, group, "mean", of=0) for s in rows[0]]


def write_table(made: Table, out: Path, failed: dict[tuple[str, str], str]) -> None:
    """Write table.json, table.csv (a line for each cell), table.md and table.png into `out`."""
    cells: list[dict[str, Any]] = [{k: getattr(s, k) for k in FIELDS} for row in made.rows for s in row]
    problems = [{"model": model, "name": name, "why": why} for (model, name), why in failed.items()]
    content = {"suite": made.suite, "scores": cells, "failed": problems}
    write_atomic(out / "table.json", json.dumps(content, indent=2, ensure_ascii=False).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    write_atomic(out / "table.csv", text.getvalue().encode())
    head = made.header()
    lines = [head, ["---", "---", "---", *["---:"] * (len(head) - 3)], *made.lines()]
    write_atomic(out / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
    _draw(made, out / "table.png")


def _draw(made: Table, path: Path) -> None:
    """Write a PNG: a line for each row of shares, a dot for each model, a tick at chance."""
    from matplotlib.figure import Figure

    rows = [row for row in made.rows if all(s.share for s in row)]
    figure = Figure((7, 1.2 + 0.28 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    chances = [next((s.chance for s in row if s.chance is not None), float("nan")) for row in rows]
    axis.plot(chances, range(len(rows)), "|", color="0.45", markersize=12, label="chance")
    for k, (model, colour) in enumerate(zip(made.models, palette(len(made.models)))):
        values = [row[k].value for row in rows]
        axis.plot([float("nan") if v is None else v for v in values], range(len(rows)), "o", color=colour, label=model)
    axis.set(xlim=(-1, 101), ylim=(len(rows) - 0.4, -0.6), xlabel="%", yticks=range(len(rows)))
    axis.set_yticklabels([row[0].name for row in rows], fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    write(figure, path)
