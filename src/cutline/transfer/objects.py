"""Pictures with objects: boxes, classes and masks, as the readers of detection data give them.

A reader lists what its files say (`Listed`, one for a picture); `split` makes a `Split` of the lists, and `Tidy` puts
boxes right on the way: a box that reaches beyond its picture is cut to it, one that lies outside or has no area is
dropped, and both are counted, told with examples, and written in the protocol.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.transfer.data import SKIP_SHARE, Sample, Size, Skip, Split
from cutline.transfer.masks import decode
from cutline.transfer.targets import header_size, read_image

SLACK = 1.0  # pixels by which a box may reach beyond its picture untold: rounding of those who drew it


@dataclass
class Objects:
    """The N objects of one picture of H × W pixels.

    boxes (N, 4) float32, x0 y0 x1 y1 in pixels; labels (N,) int64, places in the data's `classes`; crowd (N,) bool:
    objects that neither count nor harm (COCO's crowds, VOC's difficult ones), left out of training; areas (N,)
    float32, square pixels, by which scores tell small from large; masks (N, H, W) bool, or None where there are none.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32]
    masks: NDArray[np.bool_] | None = None

    @property
    def nbytes(self) -> int:
        return self.boxes.nbytes + (self.masks.nbytes if self.masks is not None else 0)

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass
class Listed:
    """A picture and its objects as a file lists them; size: (height, width) it says, None if it says nothing."""

    path: Path
    size: tuple[int, int] | None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x0 y0 x1 y1
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    segments: list[Any] = field(default_factory=list)  # polygons or RLE, None for an object without
    problem: str | None = None  # why its file of objects cannot be read


class Tidy:
    """Counts what is wrong with the objects of a split, and stops when too many had to be dropped."""

    def __init__(self, name: str) -> None:
        self.name, self.total = name, 0
        self.dropped: Counter[str] = Counter()
        self.cut = 0
        self.examples: list[str] = []

    def drop(self, reason: str, example: str) -> None:
        """Note an object that is left out."""
        self.total += 1
        self.dropped[reason] += 1
        self.examples.append(example)

    def add(
        self, to: Listed, what: str, box: Sequence[float], label: int, crowd: bool, area: float | None, segment: Any
    ) -> None:
        """Append an object to `to`, its box (x0, y0, x1, y1) put right, or drop it. what: its name for messages."""
        if len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            return self.drop("box unreadable", f"{what} has the box {box}: four finite numbers are wanted.")
        height, width = to.size or (math.inf, math.inf)
        x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
        shown = f"x {box[0]:g} to {box[2]:g}, y {box[1]:g} to {box[3]:g}, in a picture of {width}x{height}"
        if box[2] <= box[0] or box[3] <= box[1]:
            return self.drop("box without area", f"{what}: {shown}.")
        if x1 <= x0 or y1 <= y0:
            return self.drop("box outside of its picture", f"{what}: {shown}.")
        self.total += 1
        if max(abs(a - b) for a, b in zip(box, (x0, y0, x1, y1))) > SLACK:
            self.cut += 1
            self.examples.append(f"{what}: {shown}.")
        to.boxes.append((x0, y0, x1, y1))
        to.labels.append(label)
        to.crowd.append(crowd)
        to.areas.append(area if area is not None else (x1 - x0) * (y1 - y0))
        to.segments.append(segment)

    def report(self) -> dict[str, int]:
        """Tell on stderr what was found, and return the counts; raises `DataError` above `SKIP_SHARE` dropped."""
        gone = sum(self.dropped.values())
        if not gone and not self.cut:
            return {}
        counts = [f"{n} × {reason}" for reason, n in self.dropped.most_common()]
        found = [f"{gone} of {self.total} objects dropped ({', '.join(counts)})"] if gone else []
        found += [f"{self.cut} of {self.total} boxes cut to their picture"] if self.cut else []
        examples = "\n  ".join(self.examples[:3])
        message = f"{self.name}: {', '.join(found)}. For example:\n  {examples}"
        if gone > SKIP_SHARE * self.total:
            raise DataError(f"{message}\nMore than {SKIP_SHARE:.0%} dropped is too many: put the data right.")
        print(message, file=sys.stderr)
        return {**self.dropped, **({"box cut": self.cut} if self.cut else {})}


def split(name: str, listed: Sequence[Listed], masks: bool) -> Split:
    """A `Split` of listed pictures; masks: decode them too. A picture without objects is kept: a negative."""

    def read(row: int) -> Sample:
        entry = listed[row]
        if entry.problem is not None:
            raise Skip("objects unreadable", entry.problem)
        if not entry.path.is_file():
            raise Skip("picture missing", f"{entry.path} is listed and not there.")
        image = read_image(entry.path)
        height, width = image.shape[:2]
        if entry.size is not None and entry.size != (height, width):
            raise Skip(
                "size differs", f"{entry.path} is {width}x{height} and listed as {entry.size[1]}x{entry.size[0]}."
            )
        return Sample(entry.path.stem, image, _objects(entry, height, width, masks))

    def size(row: int) -> Size | None:
        return listed[row].size or header_size(listed[row].path)

    return Split(name, [entry.path.stem for entry in listed], read, size=size)


def _objects(entry: Listed, height: int, width: int, masks: bool) -> Objects:
    found = None
    if masks:
        found = np.zeros((len(entry.boxes), height, width), np.bool_)
        for mask, segment in zip(found, entry.segments, strict=True):
            if segment is None:  # a crowd without a mask of its own
                continue
            try:
                mask[:] = decode(segment, height, width)
            except (ValueError, TypeError, KeyError) as e:
                raise Skip("mask broken", f"{entry.path} has a mask that does not decode: {e}") from e
    return Objects(
        np.array(entry.boxes, np.float32).reshape(-1, 4),
        np.array(entry.labels, np.int64),
        np.array(entry.crowd, np.bool_),
        np.array(entry.areas, np.float32),
        found,
    )


def have_masks(name: str, listed: Sequence[Listed]) -> bool:
    """Whether all objects have a mask; says so on stderr if only some have, since then none is used."""
    wanted = [s for entry in listed for s, crowd in zip(entry.segments, entry.crowd) if not crowd]
    without = sum(s is None for s in wanted)
    if 0 < without < len(wanted):
        print(f"{name}: {without} of {len(wanted)} objects have no mask, so masks are left out.", file=sys.stderr)
    return bool(wanted) and not without


def same_classes(spec: str, name: str, first: Sequence[Any], other: Sequence[Any]) -> None:
    """Raise `DataError`, naming what differs, unless a split's list of classes is that of train."""
    if list(first) == list(other):
        return
    lacks, more = [c for c in first if c not in other], [c for c in other if c not in first]
    parts = [f"{verb} {', '.join(map(str, these[:5]))}" for verb, these in (("lacks", lacks), ("adds", more)) if these]
    raise DataError(f"{spec}: the categories of {name} are not those of train: it {' and '.join(parts) or 'reorders'}.")
