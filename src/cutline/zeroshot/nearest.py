"""A look at retrieval: a few pictures with their nearest texts, and a few texts with their nearest pictures."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.pairs.decode import decode
from cutline.transfer.draw import RIGHT, WRONG, write
from cutline.zeroshot.encode import Embedded

QUERIES, NEAREST = 3, 5  # of each kind, and what is shown of each
SIDE = 1.8  # inches of a picture
WORDS = {"va": "center", "fontsize": 9, "in_layout": False}


def draw_nearest(path: Path, source: Any, found: Embedded) -> None:
    """Write a PNG of queries spread over the data, each with its nearest: green where they belong together, red if not."""
    from matplotlib.figure import Figure

    pictures, texts = _spread(len(found.image)), _spread(len(found.text))
    rows = len(pictures) + len(texts)
    figure = Figure((SIDE * (NEAREST + 1), (SIDE + 0.1) * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, NEAREST + 1, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.patch.set_visible(False)  # texts run over the next ones
    for row, i in zip(axes, pictures):
        row[0].imshow(_pixels(source, found.rows[i]))
        best = (found.text @ found.image[i]).topk(min(NEAREST, len(found.text))).indices.tolist()
        for place, j in enumerate(best):
            colour = RIGHT if found.owners[j] == i else WRONG
            text = textwrap.shorten(found.texts[j], 105, placeholder=" …")
            row[1].text(0, 1 - (place + 0.5) / NEAREST, text, color=colour, transform=row[1].transAxes, **WORDS)
    for row, j in zip(axes[len(pictures) :], texts):
        text = textwrap.fill(textwrap.shorten(found.texts[j], 120, placeholder=" …"), 24)
        row[0].text(0.5, 0.5, text, ha="center", transform=row[0].transAxes, **WORDS)
        best = (found.image @ found.text[j]).topk(min(NEAREST, len(found.image))).indices.tolist()
        for axis, i in zip(row[1:], best):
            axis.imshow(_pixels(source, found.rows[i]))
            axis.spines[:].set(visible=True, color=RIGHT if found.owners[j] == i else WRONG, linewidth=3)
    write(figure, path)


def _spread(count: int) -> list[int]:
    """Up to `QUERIES` places in the middle of equal parts."""
    shown = min(QUERIES, count)
    return [(2 * k + 1) * count // (2 * shown) for k in range(shown)]


def _pixels(source: Any, row: int) -> NDArray[np.uint8]:
    data = source.read([row], ["image"])[0]["image"]
    pixels: NDArray[np.uint8] = decode(data) if isinstance(data, bytes) else data
    return pixels
