"""Drawings of predictions with a legend, a colour bar or names: a grid of picture, truth and prediction beside each
result (`…_grid`), and one picture at a time, at its own size (`…_picture`)."""

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
SHOWN, MOST = 0.3, 15  # least score of a predicted object that is drawn, and how many of a picture
UNLABELLED = (0.08, 0.08, 0.08)
NAMED = 6  # pictures in a row of `name_grid`
RIGHT, WRONG = "#1a7f37", "#b3261e"


def palette(count: int) -> NDArray[np.float64]:
    """`count` colours (count, 3) in 0 … 1, spread evenly over hue, saturation and lightness; each id keeps its own."""
    from matplotlib.colors import hsv_to_rgb

    # The additive sequence of the generalised golden ratio of three dimensions (Roberts, 2018).
    spread = (0.55 + np.arange(count)[:, None] * np.array([0.8191725, 0.6710436, 0.5497005])) % 1
    colours: NDArray[np.float64] = hsv_to_rgb(spread * [1, 0.6, 0.6] + [0, 0.4, 0.4])
    return colours


def class_grid(path: Path, samples: Sequence[Sample], masks: Sequence[NDArray[Any]], classes: Sequence[str]) -> None:
    """Write a PNG, one column a sample; the legend names the classes that occur, the commonest first."""
    from matplotlib.patches import Patch

    colours = np.vstack([palette(len(classes)), UNLABELLED])  # IGNORE = -1 is the last
    handles = _legend([*(s.target for s in samples), *masks], classes, colours)
    if any((s.target == IGNORE).any() for s in samples):
        handles.append(Patch(color=UNLABELLED, label="not labelled"))
    columns = max(1, min(len(samples) * 2, len(handles)))
    figure, axes, _ = _figure(samples, legend=0.15 + 0.18 * -(-len(handles) // columns))
    for column, sample, mask in zip(axes.T, samples, masks):
        for axis, shown in zip(column, (sample.image, colours[sample.target], colours[mask])):
            axis.imshow(shown, interpolation="nearest" if shown is not sample.image else None)
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8, handlelength=1.2)
    write(figure, path)


def class_picture(path: Path, image: NDArray[np.uint8], mask: NDArray[Any], classes: Sequence[str]) -> None:
    """Write a PNG of the mask over the picture; the legend names the classes that occur, the commonest first."""
    colours = palette(len(classes))
    handles = _legend([mask], classes, colours)
    columns = max(1, min(len(handles), int(_inches(image.shape) / 1.3)))
    figure, axis, _ = _single(image.shape, below=0.1 + 0.18 * -(-len(handles) // columns))
    grey = image.mean(2, keepdims=True) / 255  # colours of the picture would change those of the legend
    axis.imshow((0.4 * grey + 0.6 * colours[mask]).clip(0, 1), interpolation="nearest")
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8, handlelength=1.2)
    write(figure, path)


def _legend(masks: Sequence[NDArray[Any]], classes: Sequence[str], colours: NDArray[Any]) -> list[Any]:
    from matplotlib.patches import Patch

    seen = np.zeros(len(classes), np.int64)
    for values in masks:
        seen += np.bincount(values[values != IGNORE].ravel(), minlength=len(classes))
    common = [i for i in np.argsort(-seen, kind="stable") if seen[i]][:20]
    return [Patch(color=colours[i], label=classes[i]) for i in common]


def name_grid(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    true: Sequence[str],
    predicted: Sequence[str],
    shares: Sequence[float],
) -> None:
    """Write a PNG of pictures, six a row, each over its true class and the predicted one with its share of 1: green if
    right, red if not."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // NAMED)
    figure = Figure((WIDTH * NAMED, (WIDTH + 0.45) * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, NAMED, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, truth, guess, share in zip(axes, images, true, predicted, shares):
        axis.imshow(image)
        # Two texts, because only the prediction is coloured.
        place = {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 8}
        axis.text(0.5, -0.02, _short(truth), **place)
        axis.text(0.5, -0.12, f"{_short(guess)} {share:.0%}", color=RIGHT if guess == truth else WRONG, **place)
    write(figure, path)


def share_picture(path: Path, image: NDArray[np.uint8], names: Sequence[str], shares: Sequence[float]) -> None:
    """Write a PNG of the picture over bars of the best classes' shares of 1."""
    figure, _, space = _single(image.shape, below=0.1 + 0.24 * len(names), draw=image)
    bars = figure.add_axes((0.42, 0.02 * space, 0.44, 0.96 * space))
    places = range(len(names))
    bars.barh(places, shares, color=RIGHT, height=0.6)
    bars.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xticks=[], yticks=places)
    bars.set_yticklabels([_short(n) for n in names], fontsize=8)
    bars.tick_params(left=False)
    bars.spines[:].set_visible(False)
    for place, share in zip(places, shares):
        bars.text(share + 0.02, place, f"{share:.1%}", va="center", fontsize=8)
    write(figure, path)


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def depth_grid(path: Path, samples: Sequence[Sample], depths: Sequence[NDArray[Any]], max_depth: float) -> None:
    """Write a PNG, one column a sample; no reading is black; all share one logarithmic scale."""
    readings = np.concatenate([s.target[s.target > 0] for s in samples])
    low, high = np.quantile(readings, (0.01, 0.99)).tolist() if len(readings) else (0.1, max_depth)
    scale, colours = _metres(low, high)
    figure, axes, space = _figure(samples, legend=0.75)
    for column, sample, metres in zip(axes.T, samples, depths):
        truth = colours(scale(np.maximum(sample.target, low)))[..., :3]
        truth[sample.target == 0] = UNLABELLED
        for axis, shown in zip(column, (sample.image, truth, colours(scale(metres))[..., :3])):
            axis.imshow(shown)
    _bar(figure, (0.3, space * 0.65, 0.4, space * 0.15), scale, colours)
    write(figure, path)


def depth_picture(path: Path, metres: NDArray[Any]) -> None:
    """Write a PNG of depth (H, W) with a logarithmic colour bar of the range that occurs."""
    scale, colours = _metres(*np.quantile(metres, (0.01, 0.99)).tolist())
    figure, axis, space = _single(metres.shape, below=0.7)
    axis.imshow(colours(scale(metres))[..., :3])
    _bar(figure, (0.1, space * 0.72, 0.8, space * 0.15), scale, colours)
    write(figure, path)


def _metres(low: float, high: float) -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    return LogNorm(low, max(high, 1.1 * low), clip=True), colormaps["turbo_r"]


def _bar(figure: Any, place: tuple[float, float, float, float], scale: Any, colours: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import LogLocator

    ticks = LogLocator(subs=(1, 2, 5)).tick_values(scale.vmin, scale.vmax)
    axis, shown = figure.add_axes(place), ScalarMappable(scale, colours)
    figure.colorbar(
        shown, cax=axis, orientation="horizontal", ticks=ticks, format="%g", label="metres"
    ).minorticks_off()


def object_grid(
    path: Path, samples: Sequence[Sample], found: Sequence[dict[str, NDArray[Any]]], classes: Sequence[str]
) -> None:
    """Write a PNG, one column a sample: boxes with names, masks where there are some; predictions with scores.

    Shown are predictions of a score of at least `SHOWN`, at most `MOST` of a picture, and crowds dashed.
    """
    colours = palette(len(classes))
    figure, axes, _ = _figure(samples, legend=0.05)
    for column, sample, one in zip(axes.T, samples, found):
        truth = sample.target
        for axis in column:
            axis.imshow(sample.image)
        names = [classes[k] for k in truth.labels]
        _objects(column[1], colours, truth.boxes, truth.labels, names, truth.masks, truth.crowd)
        _best(column[2], colours, one, classes)
    write(figure, path)


def object_picture(
    path: Path, image: NDArray[np.uint8], found: dict[str, NDArray[Any]], classes: Sequence[str]
) -> None:
    """Write a PNG of the picture with its predicted objects, chosen as in `object_grid`."""
    figure, axis, _ = _single(image.shape, draw=image)
    _best(axis, palette(len(classes)), found, classes)
    write(figure, path)


def _best(axis: Any, colours: NDArray[Any], one: dict[str, NDArray[Any]], classes: Sequence[str]) -> None:
    best = [i for i in np.argsort(-one["scores"], kind="stable") if one["scores"][i] >= SHOWN][:MOST]
    names = [f"{classes[one['labels'][i]]} {one['scores'][i]:.2f}" for i in best]
    masks = one["masks"][best] if "masks" in one else None
    _objects(axis, colours, one["boxes"][best], one["labels"][best], names, masks, np.zeros(len(best), bool))


def _objects(
    axis: Any,
    colours: NDArray[Any],
    boxes: NDArray[Any],
    labels: NDArray[Any],
    names: Sequence[str],
    masks: NDArray[Any] | None,
    crowd: NDArray[Any],
) -> None:
    from matplotlib.patches import Rectangle

    for i, (x0, y0, x1, y1) in enumerate(boxes):
        colour = colours[labels[i]]
        if masks is not None:
            axis.imshow(np.dstack([np.broadcast_to(colour, (*masks[i].shape, 3)), 0.45 * masks[i]]))
        edges = (x0 - 0.5, y0 - 0.5)  # imshow draws the first pixel around 0
        style = "--" if crowd[i] else "-"
        axis.add_patch(Rectangle(edges, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2, linestyle=style))
        axis.text(
            *edges, names[i], fontsize=5, va="bottom" if y0 > 4 else "top", color="white", clip_on=True,
            bbox={"facecolor": colour * 0.8, "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
        )  # fmt: skip


def rate_curve(path: Path, scores: dict[float, float], best: float, metric: str, by: str) -> None:
    """Write a PNG of a sweep: the score of every learning rate, failed ones left out, and the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(scores), list(scores.values()), "o-", color="#4477aa")
    axis.plot([best], [scores[best]], "o", color=RIGHT, markersize=10, label=f"best: {best:g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"{metric} on {by}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    write(figure, path)


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


def _inches(shape: Sequence[int]) -> float:
    """Width of a drawing of a picture (H, W, …): its own at 120 dots an inch, within what can be read and looked at."""
    return min(max(shape[1] / 120, 4.0), 12.0)


def _single(shape: Sequence[int], below: float = 0.0, draw: NDArray[np.uint8] | None = None) -> tuple[Any, Any, float]:
    """A figure for one picture with `below` inches free below, its axis, and the free share of the height."""
    from matplotlib.figure import Figure

    width = _inches(shape)
    inches = width * shape[0] / shape[1] + below
    figure = Figure((width, inches), dpi=120)
    axis = figure.add_axes((0, below / inches, 1, 1 - below / inches))
    axis.set_axis_off()
    if draw is not None:
        axis.imshow(draw)
    return figure, axis, below / inches


def write(figure: Any, path: Path) -> None:
    """Write a figure as PNG, all of it or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
