"""The report of a study: a table on the terminal, and one self-contained HTML page."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.config import dump
from cutline.record import HEADLINE, Result, version, write_atomic
from cutline.study.cards import cards
from cutline.study.plan import Plan
from cutline.study.runner import Cell, results
from cutline.study.statistics import ONE_SEED, Difference, difference, headline, mean_spread, scores
from cutline.zeroshot.retrieve import RetrieveConfig

UNITS = {
    "segment": "mIoU, % ↑",
    "depth": "RMSE, m ↓",
    "classify": "top-1, % ↑",
    "detect": "AP, % ↑",
    "retrieve": "R@1, picture to text, % ↑",
}
COLOURS = ["#9aa3b2", "#d9822b", "#2b5bd7", "#0b7a4b", "#8e44ad", "#b3402a"]


def print_table(plan: Plan, out: Path) -> None:
    """The scores, and the difference of the compared arms, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    found = results(plan, out)
    table = Table(title=plan.title or plan.name)
    table.add_column("encoder")
    for name, task in plan.tasks.items():
        table.add_column(f"{name}\n{UNITS[task.task]}", justify="right")
    for row in _rows(plan, found):
        table.add_row(row["arm"], *[c["text"] + (f" ± {c['spread']}" if c["spread"] else "") for c in row["cells"]])
    if plan.compare:
        cells = [_difference_cell(plan, task, difference(plan, found, task, *plan.compare)) for task in plan.tasks]
        table.add_section()
        table.add_row("difference", *[f"{c['text']}\n{c['note']}" for c in cells])
    console = Console()
    console.print(table)
    console.print(headline(plan, found))


def write_report(plan: Plan, out: Path) -> Path:
    """Write `out/report.html` from what is finished; nothing in it is loaded from elsewhere. Returns its path."""
    import jinja2

    found = results(plan, out)
    template = jinja2.Template((Path(__file__).parent / "template.html").read_text(encoding="utf-8"), autoescape=True)
    compare = f"{plan.compare[0]} − {plan.compare[1]}" if plan.compare else ""
    html = template.render(
        title=plan.title or plan.name,
        headline=headline(plan, found),
        subtitle=_subtitle(plan),
        score_note=_score_note(plan),
        columns=[{"name": n, "unit": UNITS[t.task]} for n, t in plan.tasks.items()],
        rows=_rows(plan, found),
        compare=compare,
        differences=[_difference_cell(plan, t, difference(plan, found, t, *plan.compare)) for t in plan.tasks]
        if plan.compare
        else [],
        curves=_safe(_curves(plan, out)),
        curve_note=_curve_note(plan),
        pictures=cards(plan, out),
        predictions=_predictions(plan, out, found),
        how=_how(plan, found),
        plan=dump(plan),
    )
    path = out / "report.html"
    write_atomic(path, html.encode())
    return path


def _rows(plan: Plan, found: dict[Cell, Result]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    means: dict[str, dict[str, float]] = {t: {} for t in plan.tasks}
    for arm in plan.arms:
        cells: list[dict[str, Any]] = []
        for task in plan.tasks:
            values = list(scores(plan, found, task, arm).values())
            if not values:
                cells.append({"text": "–", "spread": "", "best": False})
                continue
            mean, spread = mean_spread(values)
            means[task][arm] = mean
            digits = _digits(plan, task)
            cells.append({"text": f"{mean:.{digits}f}", "spread": "" if spread is None else f"{spread:.{digits}f}"})
        rows.append({"arm": arm, "cells": cells})
    for i, task in enumerate(plan.tasks):
        if means[task]:
            more = HEADLINE[plan.tasks[task].task][2]
            best = (max if more else min)(means[task], key=lambda a: means[task][a])
            next(r for r in rows if r["arm"] == best)["cells"][i]["best"] = True
    return rows


def _digits(plan: Plan, task: str) -> int:
    return 3 if plan.tasks[task].task == "depth" else 1


def _difference_cell(plan: Plan, task: str, d: Difference | None) -> dict[str, str]:
    if d is None:
        return {"text": "–", "note": "", "css": ""}
    digits = _digits(plan, task)
    spread = "" if d.spread is None else f" ± {d.spread:.{digits}f}"
    css = d.verdict if d.verdict in ("better", "worse") else ""
    return {"text": f"{d.mean:+.{digits}f}{spread}", "note": d.verdict, "css": css}


def _subtitle(plan: Plan) -> str:
    seeds = f"{len(plan.seeds)} seed" + ("s" if len(plan.seeds) > 1 else "")
    seen = sorted({plan.recipe(a, plan.seeds[0]).train.samples for a, o in plan.arms.items() if o is not None} or {0})
    pictures = f"{seen[0]:,}" if len(seen) == 1 else f"{seen[0]:,} to {seen[-1]:,}"
    return f"{len(plan.arms)} encoders, {len(plan.tasks)} tasks, {seeds}; {pictures} pictures seen in each pretraining."


def _score_note(plan: Plan) -> str:
    if len(plan.seeds) > 1:
        return (
            f"Mean ± standard deviation over {len(plan.seeds)} seeds. A difference counts as clear when the mean of the "
            "paired differences is outside the 95 % interval (Student's t) around zero."
        )
    return (
        f"One seed: there is no spread to judge by, and a difference of less than {ONE_SEED:.0%} of the score is called "
        "no clear difference. Run more with --seeds."
    )


def _curve_note(plan: Plan) -> str:
    batch = plan.recipe(next(iter(plan.arms)), plan.seeds[0]).train.batch
    return (
        f"Contrastive loss of the encoders that have one. An encoder that tells nothing apart stays at log({batch}) = {math.log(batch):.2f} (dashed). The "
        "levels of different texts do not compare: what matters is that both learn."
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _svg(figure: Any) -> str:
    """The figure as inline SVG (text stays text)."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cutline", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _safe(svg: str | None) -> Any:
    from markupsafe import Markup

    return Markup(svg) if svg else None  # our own drawing, names escaped by matplotlib


def _curves(plan: Plan, out: Path) -> str | None:
    figure = _figure(9, 3.2)
    axis = figure.subplots()
    drawn = False
    for i, arm in enumerate(plan.arms):
        for seed in plan.seeds:
            path = Cell(arm, seed).folder(out) / "metrics.jsonl"
            if not path.exists():
                continue
            rows = [
                json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
            ]  # of a live run, too
            shown = [(r["samples"], _contrast(r)) for r in rows if _contrast(r)]
            if shown:
                label = arm if seed == plan.seeds[0] else None
                colour = COLOURS[i] if len(plan.arms) <= len(COLOURS) else f"C{i % 10}"
                style = "-" if i < 10 else "--" if i < 20 else ":"
                axis.plot(*zip(*shown, strict=True), color=colour, ls=style, label=label, lw=1.6)
                drawn = True
    if not drawn:
        return None
    axis.axhline(math.log(plan.recipe(next(iter(plan.arms)), 0).train.batch), color="#888", ls="--", lw=1)
    axis.set(xlabel="pictures seen", ylabel="loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7 if len(plan.arms) > len(COLOURS) else None)
    return _svg(figure)


def _contrast(row: dict[str, float]) -> float:
    """The contrastive loss in a line of metrics, the mean over text sources; 0 where there is none."""
    terms = [v for k, v in row.items() if re.fullmatch(r"contrastive/[^/]+", k)]
    return sum(terms) / max(len(terms), 1)


def _predictions(plan: Plan, out: Path, found: dict[Cell, Result]) -> list[dict[str, Any]]:
    """For the last task of each kind: picture, truth and every arm's prediction on a few scored pictures."""
    figures = []
    for kind, title in (("segment", "Segmentation, side by side"), ("depth", "Depth, side by side")):
        names = [n for n, t in plan.tasks.items() if t.task == kind]
        if not names or not plan.show:
            continue
        arms = [a for a in plan.arms if Cell(a, plan.seeds[0], names[-1]) in found]
        if arms:
            svg = _compare_predictions(plan, out, names[-1], arms)
            note = f"The first {plan.show} test pictures, not chosen; task “{names[-1]}”, seed {plan.seeds[0]}."
            figures.append({"title": title, "note": note, "svg": _safe(svg)})
    return figures


def _compare_predictions(plan: Plan, out: Path, name: str, arms: list[str]) -> str:
    from cutline.transfer.data import open_data
    from cutline.transfer.store import load

    task = plan.tasks[name]
    config = task.build(0)
    assert task.task != "retrieve"
    assert not isinstance(config, RetrieveConfig)
    data = open_data(task.data, task.task)
    split = data.split(config.split)
    samples = [split.read(i) for i in range(min(plan.show, len(split)))]
    images = [s.image for s in samples]
    columns = [("picture", images), ("truth", [s.target for s in samples])]
    columns += [(arm, load(Cell(arm, plan.seeds[0], name).folder(out)).predict(images)) for arm in arms]
    figure = _figure(2.05 * len(columns), 2.0 * len(samples) + 0.9)
    axes = figure.subplots(len(samples), len(columns), squeeze=False)
    paint = _class_painter(data.classes) if task.task == "segment" else _depth_painter(samples)
    for j, (title, pictures) in enumerate(columns):
        axes[0, j].set_title(title, fontsize=9)
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture if j == 0 else paint(picture), interpolation="nearest")
            axes[i, j].axis("off")
    if task.task == "segment":
        _class_legend(figure, data.classes, samples)
    else:
        _depth_bar(figure, axes, samples)
    return _svg(figure)


def _class_painter(classes: list[str]) -> Any:
    from cutline.transfer.draw import palette

    colours = np.vstack([palette(len(classes)), [[0.1, 0.1, 0.1]]])  # the last is for IGNORE, −1
    return lambda mask: colours[mask]


def _class_legend(figure: Any, classes: list[str], samples: list[Any]) -> None:
    from matplotlib.patches import Patch

    from cutline.transfer.draw import palette

    colours = palette(len(classes))
    seen = sorted({int(v) for s in samples for v in np.unique(s.target) if v >= 0})
    handles = [Patch(color=colours[i], label=classes[i]) for i in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)


def _depth_painter(samples: list[Any]) -> Any:
    from matplotlib import colormaps

    scale = _depth_scale(samples)

    def paint(metres: NDArray[Any]) -> NDArray[Any]:
        shown: NDArray[Any] = colormaps["turbo_r"](scale(np.maximum(metres, scale.vmin)))[..., :3]
        shown[metres == 0] = 0.1
        return shown

    return paint


def _depth_scale(samples: list[Any]) -> Any:
    """Logarithmic, over the readings of the pictures shown: near things differ by centimetres, far ones by metres."""
    from matplotlib.colors import LogNorm

    readings = np.concatenate([s.target[s.target > 0] for s in samples])
    low, high = (float(readings.min()), float(readings.max())) if len(readings) else (0.1, 10.0)
    return LogNorm(low, max(high, low * 1.1), clip=True)


def _depth_bar(figure: Any, axes: Any, samples: list[Any]) -> None:
    from matplotlib.cm import ScalarMappable

    scale = ScalarMappable(_depth_scale(samples), "turbo_r")
    figure.colorbar(scale, ax=axes, orientation="horizontal", label="metres (black: no reading)", shrink=0.4, aspect=40)


def _how(plan: Plan, found: dict[Cell, Result]) -> list[str]:
    arms = "; ".join(
        f"{a}: " + ("no pretraining" if o is None else ", ".join(f"{k} = {v}" for k, v in o.items()) or "the base")
        for a, o in plan.arms.items()
    )
    lines = [
        f"The arms differ in this alone: {arms}. They share towers, seeds, order of samples, steps and, for every task, "
        "labels, head and schedule, where nothing else is named here."
    ]
    if plan.name.startswith("quickstart-"):
        lines += [
            "Pictures of training, of labels and of test are different scenes; settings were chosen on validation scenes."
        ]
    for name in plan.tasks:
        first = next((r for c, r in found.items() if c.task == name), None)
        if first is not None and first.protocol.task == "retrieve":
            m = first.metrics
            lines.append(
                f"{name}: {m['pictures']:,.0f} pictures and {m['texts']:,.0f} texts of {first.protocol.data}, without training; "
                f"chance {m['chance_i2t_r1']:.1%}; protocol {first.protocol.column()}."
            )
        elif first is not None:
            s = first.protocol.settings
            what = "frozen encoder, " if s.get("frozen") else "fine-tuned, "
            lines.append(
                f"{name}: {what}{s.get('head')} head, {s.get('trained')} labelled pictures, {s.get('steps')} steps, scored on "
                f"{s.get('scored')} pictures of {first.protocol.data} ({first.protocol.split}); protocol {first.protocol.column()}."
            )
    lines.append(f"cutline {version()}.")
    return lines
