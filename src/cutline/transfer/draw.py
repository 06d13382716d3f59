"""A grid of predictions beside each result: picture, truth and prediction, with a legend or a colour bar."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.record import write_atomic
from cutline.transfer.data import Sample
from cutline.transfer.metrics import IGNORE

WIDTH = 2.2  # inches of one picture
NAMES = ("picture", "truth", "prediction")
UNLABELLED = (0.08, 0.08, 0.08)


def palette(count: int) -> NDArray[np.float64]:
    """`count` colours (count, 3) in 0 … 1: hues a golden angle apart in three lightnesses, so neighbours differ."""
    from matplotlib.colors import hsv_to_rgb

    k = np.arange(count)
    hsv = np.stack(
        [(0.58 + k * 0.61803) % 1, np.array([0.65, 0.85, 0.45])[k % 3], np.array([0.9, 0.65, 0.98])[k % 3]], 1
    )
    colours: NDArray[np.float64] = hsv_to_rgb(hsv)
    return colours


def class_grid(path: Path, samples: Sequence[Sample], masks: Sequence[NDArray[Any]], classes: Sequence[str]) -> None:
    """Write a PNG with one column a sample; the legend names the classes that occur, the commonest first."""
    from matplotlib.patches import Patch

    colours = np.vstack([palette(len(classes)), UNLABELLED])  # IGNORE = -1 is the last
    figure, axes, _ = _figure(samples, legend=1.0)
    seen = np.zeros(len(classes), np.int64)
    for column, sample, mask in zip(axes.T, samples, masks):
        for values in (sample.target, mask):
            seen += np.bincount(values[values != IGNORE].ravel(), minlength=len(classes))[: len(classes)]
        for axis, shown in zip(column, (sample.image, colours[sample.target], colours[mask])):
            axis.imshow(shown, interpolation="nearest" if shown is not sample.image else None)
    common = [i for i in np.argsort(-seen, kind="stable") if seen[i]][:20]
    handles = [Patch(color=colours[i], label=classes[i]) for i in common]
    if any((s.target == IGNORE).any() for s in samples):
        handles.append(Patch(color=UNLABELLED, label="not labelled"))
    columns = max(1, min(len(samples) * 2, len(handles)))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8, handlelength=1.2)
    _write(figure, path)


def depth_grid(path: Path, samples: Sequence[Sample], depths: Sequence[NDArray[Any]], max_depth: float) -> None:
    """Write a PNG with one column a sample; pixels without a reading are black, all pictures share one scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    top = min(max_depth, max([float(s.target.max()) for s in samples] + [0.1]))
    scale, colours = Normalize(0, top), colormaps["turbo_r"]
    figure, axes, space = _figure(samples, legend=0.6)
    for column, sample, metres in zip(axes.T, samples, depths):
        truth = colours(scale(sample.target))[..., :3]
        truth[sample.target == 0] = UNLABELLED
        for axis, shown in zip(column, (sample.image, truth, colours(scale(metres))[..., :3])):
            axis.imshow(shown)
    bar = figure.add_axes((0.3, space * 0.55, 0.4, space * 0.2))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal", label="metres")
    _write(figure, path)


def _figure(samples: Sequence[Sample], legend: float) -> tuple[Any, NDArray[Any], float]:
    """A figure of 3 rows with `legend` inches free below, its axes (3, samples), and the free share of the height."""
    from matplotlib.figure import Figure

    height, width = np.max([s.image.shape[:2] for s in samples], 0)
    inches = 3 * WIDTH * height / width + legend
    figure = Figure((WIDTH * len(samples) + 0.3, inches), dpi=120)
    axes = figure.subplots(3, len(samples), squeeze=False)
    figure.subplots_adjust(0.3 / figure.get_figwidth(), legend / inches, 0.995, 0.995, 0.03, 0.03)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, name in zip(axes[:, 0], NAMES):
        axis.set_ylabel(name)
    return figure, axes, legend / inches


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
