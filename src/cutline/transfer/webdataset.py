"""Webdataset tars with a class beside each picture, as CLIP_benchmark writes them: PATH/{train,test[,val]}/*.tar.

A sample is a picture (jpg, png, webp, …) and `cls`, the class id as text; `classnames.txt` names the classes, one a
line. Pictures are read where they lie in the tars. CLIP_benchmark's data sets have no val: choose `split=test`, or hold
a tenth of train out with `val=0.1`. For "zeroshot" one part will do, and the prompts are those of
`zeroshot_classification_templates.txt` if it is there.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cutline.errors import DataError
from cutline.pairs.pictures import Files
from cutline.pairs.report import IngestReport
from cutline.pairs.samples import Missing, Picture, Wanted
from cutline.pairs.tars import TarFeed
from cutline.transfer.classes import PARTS, Pictures, class_data, scored_parts, spec_options, val_share
from cutline.transfer.data import DenseData, Skip, Task
from cutline.transfer.files import names_in

LAYOUT = "The layout is {train,test}/*.tar, each sample a picture and its class id in .cls"


class Row(NamedTuple):
    """A sample of a tar; cls: its class file, if it has one."""

    key: str
    picture: Picture | None
    cls: bytes | None


def open(rest: str, task: Task) -> DenseData:
    """Open `webdataset:PATH[,val=0.1]`."""
    path, options = spec_options("webdataset", rest, {"val": "0.1"})
    spec, root = f"webdataset:{rest}", Path(path)
    share = val_share(spec, options)
    found = [name for name in PARTS if (root / name).is_dir()]
    if task == "zeroshot" and options:
        raise DataError(f"{spec}: nothing is trained here, so nothing is held out: leave val= out.")
    if not found or (task == "classify" and "train" not in found):
        raise DataError(f"{spec}: there is no folder {root / ('train' if task == 'classify' else 'test')}. {LAYOUT}.")
    rows = {name: _rows(root / name) for name in scored_parts(found, task)}
    names = names_in(root / "classnames.txt")
    prompts = names_in(root / "zeroshot_classification_templates.txt") or []
    parts = {name: _pictures(found, names) for name, found in rows.items()}
    if names is None:
        names = [str(i) for i in range(max(int(p.labels.max(initial=-1)) for p in parts.values()) + 1)]
    return class_data(spec, task, parts, names, share, {}, prompts)


def _rows(folder: Path) -> list[Row]:
    tars = sorted(folder.glob("*.tar"), key=lambda p: (len(p.name), p.name))  # 2.tar before 10.tar
    if not tars:
        raise DataError(f"{folder} has no .tar in it. {LAYOUT}.")
    feed, report = TarFeed(tars), IngestReport()
    wanted = Wanted({"cls": "cls"})
    rows: list[Row] = []
    for part, tar in enumerate(tars):
        for sample in feed.samples(part, wanted, report):
            key = f"{folder.name}/{tar.stem}/{sample.key}"
            rows.append(
                Row(key, None, None) if isinstance(sample, Missing) else Row(key, sample.picture, sample.values[0])
            )
    if report.skipped:
        print(f"{folder}: {report.reasons()}.", file=sys.stderr)
    return rows


def _id(cls: bytes | None) -> int:
    """The class id, -1 for what is none."""
    try:
        return max(-1, int(cls or b""))
    except ValueError:
        return -1


def _pictures(rows: list[Row], names: list[str] | None) -> Pictures:
    labels, problems = np.full(len(rows), -1, np.int64), dict[int, Skip]()
    for i, row in enumerate(rows):
        label = _id(row.cls)
        if row.picture is None:
            problems[i] = Skip("no picture", f"{row.key} has no picture (.jpg, .png, .webp, …) beside its .cls.")
        elif row.cls is None:
            problems[i] = Skip("no class", f"{row.key} has no .cls beside its picture.")
        elif label < 0:
            text = row.cls[:40].decode("utf-8", "replace")
            problems[i] = Skip("class is no number", f"{row.key}: {text!r} in .cls is no class id (0, 1, 2, …).")
        elif names is not None and label >= len(names):
            problems[i] = Skip("class out of range", f"{row.key}: class {label} is beyond the {len(names)} classnames.")
        else:
            labels[i] = label
    files = Files()

    def read(row: int) -> bytes:
        picture = rows[row].picture
        assert picture is not None
        assert picture.uri is not None
        try:
            return os.pread(files.get(picture.uri).fileno(), picture.size, picture.position or 0)
        except OSError as e:
            raise Skip("picture unreadable", f"{rows[row].key}: {e.strerror}") from e

    marks = [f"{r.picture.size} {r.picture.tail.hex()}" if r.picture else "none" for r in rows]
    return Pictures([r.key for r in rows], labels, read, marks, problems)
