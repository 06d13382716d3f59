"""Hugging Face datasets (`hf:NAME_OR_FOLDER[:SPLIT]`, extra `hf`). Their pictures are stored in the table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.pairs.files import TEXTS, picture_bytes, picture_file
from cutline.pairs.report import IngestReport
from cutline.pairs.samples import Missing, Sample, Wanted, dig, split_field


class HuggingFaceFeed:
    """Rows of one split. A field is a column; `column:key` reaches into a nested one.

    The key is the column `key`, `id` or `image_id`, else the row's number.
    """

    def __init__(self, spec: str, image: str | None = None) -> None:
        name, _, split = spec.partition(":")
        data = _load(name, split)
        from datasets import Image

        columns = list(data.features)
        found = [c for c, f in data.features.items() if isinstance(f, Image)]
        self.image = image or (found[0] if found else "")
        if self.image not in columns:
            raise DataError(
                f"'hf:{spec}' has no column of pictures ({image or 'type Image'}); it has {', '.join(columns)}."
            )
        if isinstance(data.features[self.image], Image):
            data = data.cast_column(self.image, Image(decode=False))
        self.data, self.name, self.columns = data, name, columns
        self.parts = [f"hf:{spec}"]
        self.identity: list[Any] = [spec, len(data), image]
        self.id = next((c for c in ("key", "id", "image_id") if c in columns), None)
        self.captions = "captions" if "captions" in columns else None
        self.alt = next((c for c in TEXTS if c in columns), None)

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        fields = [split_field(f) for f in wanted.fields.values()]
        for name, _ in fields:
            if name and name not in self.columns:
                raise DataError(f"{self.parts[0]!r} has no column {name!r}; it has {', '.join(self.columns)}.")
        for number, row in enumerate(self.data):
            key = str(row[self.id]) if self.id and row[self.id] is not None else f"{number:08d}"
            cell = row[self.image]
            cell = {"path": cell} if isinstance(cell, str) else cell
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if data is None and isinstance(cell, dict) and cell.get("path"):
                try:
                    data = picture_file(Path(cell["path"]), inline=True).data
                except OSError as e:
                    yield Missing(key, f"picture file cannot be read ({e.strerror})")
                    continue
            if not isinstance(data, bytes):
                yield Missing(key, "no picture")
                continue
            yield Sample(key, picture_bytes(data), [dig(row, [name, *at]) if name else None for name, at in fields])


def _load(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise DataError("reading Hugging Face datasets needs the extra `hf`: pip install 'cutline[hf]'.") from e
    try:
        saved = Path(name).is_dir() and any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as e:  # the library raises many kinds: of the network, the file system, its own
        raise DataError(f"cannot load the Hugging Face dataset {name!r}: {e}") from e
    if isinstance(data, dict):
        split = split or ("train" if "train" in data else next(iter(data)))
        if split not in data:
            raise DataError(f"the dataset {name!r} has no split {split!r}; it has {', '.join(data)}.")
        return data[split]
    return data
