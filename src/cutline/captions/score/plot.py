"""The plot of a summary: a histogram of each score, the shares of the flags, and how scores rank captions by truth."""

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cutline.captions.score import truth

if TYPE_CHECKING:
    from cutline.captions.score.summary import Summary

WIDE = 4  # panels in a row
COLOUR, LINE = "#2b5bd7", "#d9822b"


def draw(summary: "Summary", values: dict[str, NDArray[np.float32]]) -> bytes:
    """The plot as PNG. values: score → value of each caption, NaN where there is none."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Any], None]] = [
        partial(_histogram, name=name, values=values[name]) for name in summary.numbers
    ]
    if summary.flags:
        panels.append(partial(_bars, title="share of captions", shares=summary.flags))
    if summary.languages:
        first = dict(list(summary.languages.items())[:8])
        shares = {code: n / summary.captions for code, n in first.items()}
        panels.append(partial(_bars, title="language", shares=shares))
    if summary.spearman:
        known = {name: by.get("object_f1") for name, by in summary.spearman.items()}
        ranked = {name: rho for name, rho in known.items() if rho is not None}
        panels.append(partial(_bars, title="Spearman's ρ with object f1", shares=ranked, low=-1.0))
    rows = max(1, -(-len(panels) // WIDE))
    figure = Figure((3.2 * WIDE, 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{summary.column}: {summary.captions:,} captions", fontsize=11)
    axes = np.atleast_1d(figure.subplots(rows, WIDE, squeeze=False).ravel())
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _histogram(axis: Any, name: str, values: NDArray[np.float32]) -> None:
    present = values[~np.isnan(values)]
    low, high = np.quantile(present, [0.001, 0.999])  # a few wild values would squeeze all others into one bar
    bins: Any = 40
    if name in truth.KINDS:
        low, high = 0.0, 1.0
    elif (present == np.round(present)).all() and high > low:
        step = max(1, round((high - low) / bins))  # else some bars would hold more integers than others
        bins = np.arange(np.floor(low), np.ceil(high) + step + 1, step) - 0.5
    axis.hist(present.clip(low, high), bins=bins, range=(low, high), color=COLOUR)
    axis.axvline(np.median(present), color=LINE, lw=1.5)
    _style(axis, f"{name.replace('_', ' ')} (median {np.median(present):.3g})")


def _bars(axis: Any, title: str, shares: dict[str, float], low: float = 0.0) -> None:
    """Horizontal bars of numbers between `low` and 1."""
    bars = axis.barh(list(shares), list(shares.values()), color=COLOUR)
    axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(low * 1.2, 1.2)
    _style(axis, title)


def _style(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
