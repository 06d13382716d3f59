"""The published DataCompDR sets as columns of a table of pairs (apple/DataCompDR-12M, -12M-bf16, -1B, DFNDR-2B).

They come as webdataset tars without pictures; a sample has `json` {"uid", "sha256"}, `url.txt`, `syn.json` {"syn_text":
captions}, `paug.json` {"param_aug": for each augmentation [[top, left, height, width], [[operation, magnitude], …]]}, and
`npz` (float32) or `pth.gz` (bfloat16) with "image_emb" (augmentations × D) and "text_emb", the embeddings of the original
text and then of the synthetic ones. Newer sets keep the latter under "syn_text_emb", one key for each of `syn.json`.

Samples are found by uid (`shards.py`), batch by batch, as any other work of the engine. Operations are those of
torchvision's RandAugment by number or name, with its magnitudes at the size the views were made at; they become ours,
which hold at any size. Nothing is unpickled: arrays with `allow_pickle=False`, tensors with `weights_only=True`.

The published crops are in pixels of the pictures as img2dataset had stored them: use them with pictures of that size. A
crop outside its picture is found in training and counted; a smaller one of a larger picture cannot be.
"""

import gzip
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from cutline.captions.reinforce import AUGMENTATIONS, Vectors, vectors
from cutline.captions.shards import Broken, Shards
from cutline.captions.work import Failed, Made, Row, Worker
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs, Provenance
from cutline.pairs.report import utf8
from cutline.pairs.sources import matching_files
from cutline.record import fingerprint
from cutline.train.stream.randaugment import OPERATIONS, Operation, is_operation
from cutline.train.stream.replay import Teacher, to_stored
from cutline.train.stream.text import captions_of
from cutline.train.stream.transforms import Augment, Augmentation

PUBLISHED = [Teacher(name=f"ViT-L-14:{tag}", width=768) for tag in ("openai", "datacomp_xl_s13b_b90k")]
ARRAYS = ("npz", "pth.gz")  # float32 first, where there are both


class ImportConfig(Config):
    """What is imported. shards: paths, brace and glob patterns; by: the table's column with the uid (None: `uid` where
    there is one, else the key, which is then compared with the samples' names); alt: the column with the original text;
    teachers: whose parts the vectors have, in order (default: DataCompDR's).
    """

    shards: list[str] = Field(min_length=1)
    by: str | None = None
    alt: str = "alt"
    teachers: list[Teacher] = Field(default_factory=lambda: list(PUBLISHED), min_length=1)


@dataclass(frozen=True)
class ImportWork:
    """Make it with `import_work`. by: the column with the uid."""

    config: ImportConfig
    by: str
    name: str
    shards: Shards

    @property
    def captions(self) -> str:
        """The column of the synthetic captions."""
        return f"caption_{self.name}"

    @property
    def reads(self) -> list[str]:
        return list(dict.fromkeys([self.by, self.config.alt]))

    @property
    def writes(self) -> dict[str, "pa.DataType | str"]:
        kind = vectors(sum(t.width for t in self.config.teachers))
        texts = [f"{self.name}_text_{c}" for c in (self.config.alt, self.captions)]
        lists: dict[str, pa.DataType | str] = {
            self.captions: pa.list_(pa.string()),
            f"{self.name}_augment": AUGMENTATIONS,
        }
        return lists | dict.fromkeys([f"{self.name}_image", *texts], kind)

    def provenance(self) -> Provenance:
        settings = {
            "teachers": [t.model_dump() for t in self.config.teachers],
            "augment": Augment(scale=(0.08, 1.0), operations=2).model_dump(mode="json"),
            "shards": fingerprint([[Path(s).name, os.path.getsize(s)] for s in self.shards.paths]),
        }  # fmt: skip
        names = ", ".join(t.name for t in self.config.teachers)
        return Provenance(how="reinforce --import", model=names, inputs=self.reads, settings=settings)

    def load(self) -> "Importer":
        return Importer(self)


def import_work(pairs: Pairs, config: ImportConfig, name: str = "dr", show: bool = True) -> ImportWork:
    """The work of `cutline reinforce PAIRS --import SHARDS --as NAME`; reads the tars' headers and uids.

    Raises `DataError` for columns and files that are not there, tars without a sample, and vectors that are not as wide
    as the teachers together.
    """
    by = config.by or ("uid" if "uid" in pairs.columns else "key")
    pairs.check_columns([by, config.alt])
    paths = [p for pattern in config.shards for p in matching_files(pattern)]
    shards = Shards(paths, by_key=by == "key", show=show)
    _check_uids(pairs, by, shards)
    work = ImportWork(config, by, name, shards)
    _check_width(work)
    return work


def parse_teachers(text: str) -> list[Teacher]:
    """NAME=WIDTH[@SCALE],… → teachers, in the order of their parts of a vector."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(.+)=(\d+)(?:@([\d.]+))?\s*", item)
        if not match:
            raise ConfigError(
                f"{item!r} does not say how wide the teacher's vectors are. Write NAME=WIDTH@SCALE for each, in order, "
                "for example ViT-L-14:openai=768@100,ViT-L-14:datacomp_xl_s13b_b90k=768@100."
            )
        found.append(Teacher(name=match[1], width=int(match[2]), logit_scale=float(match[3] or 100)))
    return found


def _check_uids(pairs: Pairs, by: str, shards: Shards) -> None:
    """Raise `DataError` if no row is in the shards."""
    first = None
    for batch in pairs.dataset.scanner(columns=[by], filter=pairs.filter).to_batches():
        for uid in batch[by].drop_null().to_pylist():
            first = first or uid
            if str(uid) in shards:
                return
    raise DataError(
        f"no row of {pairs.path!r} is in the shards: rows are joined by the column {by!r} (there is {first!r}), samples by "
        f"{'their names' if shards.by_key else 'the uid in their json'} (there is {shards.example!r}). Name another column with by=COLUMN."
    )


def _check_width(work: ImportWork) -> None:
    """The first sample that can be read says how wide the vectors are."""
    told = [t.width for t in work.config.teachers]
    for found in work.shards.first(100):
        try:
            width = _arrays(found)["image_emb"].shape[1]
        except Broken:
            continue
        if width != sum(told):
            raise DataError(
                f"the vectors in {work.shards.paths[0]} are {width} wide, and those of the teachers "
                f"{', '.join(t.name for t in work.config.teachers)} are {' + '.join(map(str, told))}. Name the teachers "
                "they were made with, with their widths and logit scales: --teachers NAME=WIDTH@SCALE,…"
            )
        return


class Importer(Worker):
    """Rows → what the tars hold for their uid."""

    def __init__(self, work: ImportWork) -> None:
        self.work = work

    def make(self, prepared: list[Row]) -> Made:
        return [self._row(row) for row in prepared]

    def _row(self, row: Row) -> Mapping[str, Any] | Failed:
        uid = row[self.work.by]
        if uid is None:
            return Failed(f"{self.work.by} is null")
        try:
            found = self.work.shards.sample(str(uid))
            return Failed("not in the shards") if found is None else self._values(found, row)
        except Broken as e:
            return Failed(str(e))

    def _values(self, found: dict[str, bytes], row: Row) -> dict[str, Any]:
        work, name, teachers = self.work, self.work.name, self.work.config.teachers
        alt = work.config.alt
        keys, captions = _captions(_json(found, "syn.json"))
        arrays = _arrays(found)
        original, synthetic = _texts(arrays, keys, len(captions))
        if len(original) != max(1, len(captions_of(alt, row[alt]))):
            raise Broken(
                f"there are {len(original)} embeddings of original texts, and another number of texts in {alt}"
            )
        augmentations = _augmentations(_json(found, "paug.json"), max(t.size for t in teachers))
        if len(augmentations) != len(arrays["image_emb"]):
            raise Broken("image_emb and param_aug have different lengths")
        counting = [i for i, t in enumerate(captions) if captions_of("syn_text", t)]
        embedded = {"image": arrays["image_emb"], f"text_{alt}": original}
        embedded[f"text_{work.captions}"] = synthetic[counting or [0]]  # where none counts, the first stands for ""
        halves = {f"{name}_{k}": _halves(v, sum(t.width for t in teachers)) for k, v in embedded.items()}
        return {work.captions: [captions[i] for i in counting] or None, f"{name}_augment": augmentations, **halves}


def _json(found: dict[str, bytes], member: str) -> dict[str, Any]:
    try:
        content = json.loads(found[member])
    except KeyError:
        raise Broken(f"no {member}") from None
    except ValueError as e:
        raise Broken(f"{member} does not parse") from e
    if not isinstance(content, dict):
        raise Broken(f"{member} is no object")
    return content


def _arrays(found: dict[str, bytes]) -> dict[str, NDArray[np.float32]]:
    """The embeddings of a sample by name."""
    member = next((m for m in ARRAYS if m in found), None)
    if member is None:
        raise Broken("neither npz nor pth.gz")
    try:
        if member == "npz":
            with np.load(io.BytesIO(found[member]), allow_pickle=False) as file:
                arrays = {k: np.asarray(file[k], np.float32) for k in file.files if "_emb" in k}
        else:
            content = torch.load(io.BytesIO(gzip.decompress(found[member])), "cpu", weights_only=True)
            arrays = {k: torch.as_tensor(v).float().numpy() for k, v in content.items() if "_emb" in k}
    except Exception as e:  # gzip, zlib, zipfile, NumPy, pickle and torch each have their own
        raise Broken(f"{member} is broken, or holds more than plain arrays and is refused") from e
    if "image_emb" not in arrays or "text_emb" not in arrays or any(a.ndim != 2 for a in arrays.values()):
        raise Broken(f"{member} lacks image_emb or text_emb")
    return arrays


def _captions(said: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The keys of `syn.json` and the captions under them, one after the other."""
    keys = [k for k in said if k.startswith("syn_text")]
    captions: list[Any] = [t for k in keys for t in (said[k] if isinstance(said[k], list) else [None])]
    if not captions or not all(isinstance(t, str) for t in captions):
        raise Broken("syn.json holds no list of texts")
    return keys, [utf8(t) for t in captions]


def _texts(arrays: dict[str, Any], keys: list[str], count: int) -> tuple[Any, Any]:
    """Embeddings of the original texts and of the `count` synthetic ones under `keys`."""
    given = arrays["text_emb"]
    if keys and all(f"{k}_emb" in arrays for k in keys):
        original, synthetic = given, np.concatenate([arrays[f"{k}_emb"] for k in keys])
    else:
        original, synthetic = given[: len(given) - count], given[len(given) - count :]
    if len(synthetic) != count or not len(original):
        raise Broken("text_emb and syn_text have different lengths")
    return original, synthetic


def _augmentations(paug: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """`param_aug` as a value of our column; for views of `size` pixels."""
    try:
        listed = paug["param_aug"]
        if isinstance(listed, str):  # JSON in JSON, as mirrors of the sets in parquet have it
            listed = json.loads(listed)
        return [_augmentation(a, size) for a in listed]
    except (TypeError, ValueError, LookupError) as e:
        raise Broken("param_aug has another form than [[top, left, height, width], [[operation, magnitude], …]]") from e


def _augmentation(stored: Any, size: int) -> dict[str, Any]:
    (top, left, height, width), *rest = stored
    if min(top, left) < 0 or min(height, width) < 1 or max(top, left, height, width) > 2**31 - 1:
        raise ValueError("no crop")
    drawn = (rest[0] if rest else None) or []  # None: RandAugment was left out by chance
    operations = tuple(_operation(which, float(magnitude), size) for which, magnitude in drawn)
    if not all(is_operation(o) for o in operations):
        raise ValueError("no operation")
    return to_stored(Augmentation(int(top), int(left), int(height), int(width), (0, 0), False, operations))


def _operation(which: int | str, magnitude: float, size: int) -> Operation:
    """One of torchvision's RandAugment, at views of `size` pixels, as ours: see `randaugment`."""
    name = dict(enumerate(OPERATIONS))[which] if isinstance(which, int) else which
    if name.startswith("Translate"):  # pixels
        return name, magnitude / size
    if name == "Posterize":  # bits kept
        return name, 8 - magnitude
    if name == "Solarize":  # the threshold
        return name, 1 - magnitude / 255
    return name, magnitude


def _halves(array: NDArray[np.float32], width: int) -> Vectors:
    if array.shape[1] != width:
        raise Broken(f"vectors are {array.shape[1]} wide and not {width}")
    if not np.isfinite(array).all():
        raise Broken("embeddings are not finite")
    return array.astype(np.float16)
