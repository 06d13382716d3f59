"""COCO captions JSON: {"images": [{"id", "file_name", …}], "annotations": [{"image_id", "caption"}]}.

The whole JSON is read into memory (COCO's own 600,000 captions take about half a gigabyte).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.pairs.files import picture_file
from cutline.pairs.report import IngestReport
from cutline.pairs.samples import Missing, Sample, Wanted, dig, split_field


class CocoFeed:
    """Pictures in the order of "images". The field `captions` is the list of a picture's captions, any other field a
    key of its entry in "images" (`license`, `coco_url`, …). The key is the file name without its extension.
    """

    alt, captions = None, "captions"

    def __init__(self, spec: str) -> None:
        name, _, folder = spec.partition(",")
        self.path = Path(name)
        if not self.path.is_file():
            raise DataError(f"no such file: {name!r} (from 'coco:{spec}').")
        try:
            content = json.loads(self.path.read_bytes())
            self.images: list[dict[str, Any]] = [{**i, "file_name": str(i["file_name"])} for i in content["images"]]
            pairs = [(a["image_id"], a["caption"]) for a in content["annotations"] if a.get("caption") is not None]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(
                f'{name!r} is not COCO JSON: "images" with a "file_name" each and "annotations" with an "image_id" '
                f"each are wanted, and it gave {e!r}."
            ) from e
        self.texts: dict[Any, list[str]] = {}
        for image, caption in pairs:
            self.texts.setdefault(image, []).append(caption)
        self.folder = self._folder(folder)
        self.parts = [name]
        self.identity: list[Any] = [str(self.path.resolve()), self.path.stat().st_size, str(self.folder)]

    def _folder(self, given: str) -> Path:
        """The folder that holds the first picture: as given, or where COCO's own layout would put it."""
        beside = self.path.resolve().parent
        part = self.path.stem.split("_", 1)[-1]  # captions_train2017 → train2017
        tried = [Path(given).resolve()] if given else []
        tried += (
            []
            if given
            else [up / sub for up in (beside, beside.parent) for sub in (part, ".", "images", f"images/{part}")]
        )
        names = [i["file_name"] for i in self.images[:100]]
        for folder in tried:
            if any((folder / n).is_file() for n in names):
                return folder
        shown = ", ".join(map(str, tried[:3]))
        raise DataError(
            f"the pictures of {str(self.path)!r} are not in {shown}. Name their folder: coco:{self.path},FOLDER"
        )

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        fields = [split_field(f) for f in wanted.fields.values()]
        for image in self.images:
            path = self.folder / image["file_name"]
            key = os.path.splitext(image["file_name"])[0]
            try:
                picture = picture_file(path, wanted.inline)
            except OSError as e:
                yield Missing(key, f"picture file cannot be read ({e.strerror})")
                continue
            entry = {**image, "captions": self.texts.get(image.get("id"))}
            yield Sample(key, picture, [dig(entry, [name, *at]) if name else None for name, at in fields])
