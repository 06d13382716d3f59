"""What `cutline reinforce` has stored, given back in training (DataCompDR: MobileCLIP, arXiv 2311.17049).

Under a prefix, "dr" for example, stand these columns; D is the sum of the teachers' widths, and each teacher's part of a
vector is of length 1:

- `dr_augment`: a list of augmentations {top, left, height, width, flip, operations: list of {name, amount}}, the crop in
  pixels of the whole upright picture (see `Augmentation` and `randaugment`);
- `dr_image`: a float16[D] for each of these augmentations;
- `dr_text_COLUMN`: a float16[D] for each caption of COLUMN that counts (`captions_of`), or one for "" where none does.

In each epoch the view "image" of a row is one of its stored augmentations, drawn from (seed, epoch, row), and whoever
asks the stream for the columns below gets the teachers' vectors of what was drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.train.stream.randaugment import is_operation
from cutline.train.stream.source import Cached, Source
from cutline.train.stream.text import Draw, Pick, TextConfig, captions_of
from cutline.train.stream.transforms import Augment, Augmentation

# What is asked for among `Stream(columns=…)` and found in `Batch.columns`; a name of a table's column has no slash.
DRAWN = "teacher/augmentation"  # (B,) int64: which of the row's augmentations; always there
IMAGE = "teacher/image"  # (B, D) float16
TEXT = "teacher/text"  # gives "teacher/text/SOURCE", (M, D) float16, for each of the batch's texts
TEACHERS = "teachers"  # list[Teacher], beside either of them

Row = Mapping[str, Any]
Vector = NDArray[np.float16]


class Teacher(Config):
    """A model whose embeddings are stored. name: for `towers.load`; hash: of its weights; width: of its part of a
    vector; logit_scale: its own (the factor, not its logarithm); size: pixels of the views it saw.
    """

    name: str
    hash: str = ""
    width: int = Field(ge=1)
    logit_scale: float = Field(100.0, gt=0)
    size: int = Field(224, ge=1)


class Unusable(Exception):
    """A row that cannot be replayed. reason: to count by; detail: the values."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def to_stored(how: Augmentation) -> dict[str, Any]:
    """An augmentation as a value of `dr_augment`."""
    stored = {k: v for k, v in how._asdict().items() if k != "size"}
    return stored | {"operations": [{"name": n, "amount": a} for n, a in how.operations]}


def from_stored(stored: Row, size: tuple[int, int]) -> Augmentation:
    """A value of `dr_augment` for a picture of `size` (H, W). Raises `Unusable` where it does not fit the picture."""
    operations = tuple((o["name"], o["amount"]) for o in stored["operations"] or ())
    crop = top, left, h, w = (stored[k] for k in ("top", "left", "height", "width"))
    if None in crop or min(top, left) < 0 or min(h, w) < 1 or top + h > size[0] or left + w > size[1]:
        raise Unusable("stored crop outside the picture", f"{h} × {w} at ({top}, {left}) of {size[0]} × {size[1]}")
    for operation in operations:
        if not is_operation(operation):
            raise Unusable("unknown stored operation", "{} {}".format(*operation))
    return Augmentation(top, left, h, w, size, bool(stored["flip"]), operations)


def teachers_of(pairs: Any, column: str) -> list[Teacher]:
    """The teachers of a column of a table of pairs, in the order of their parts; raises `DataError` if it has none."""
    teachers = _settings(pairs, column).get("teachers")
    if not teachers:
        raise DataError(
            f"the column {column!r} of {pairs.path!r} does not say which teachers made it. Make it with "
            "`cutline reinforce`, which stores their names, widths and logit scales."
        )
    return [Teacher.model_validate(t) for t in teachers]


class Replay:
    """The stored augmentations of a source, and its teachers' vectors as far as they are `asked` for (IMAGE, TEXT).

    columns: what has to be read of a row; augment: for `replay_view`. Raises `ConfigError` for columns that are not there and
    `DataError` for vectors that do not belong to the teachers or to the captions there are now.
    """

    def __init__(self, source: Source, prefix: str, text: TextConfig | None, asked: Sequence[str]) -> None:
        self.prefix, self.path = prefix, ""
        self.stored, self.image_column = f"{prefix}_augment", f"{prefix}_image"
        self.image = IMAGE in asked
        self.text_columns = {c: f"{prefix}_text_{c}" for c in (text.columns if text and TEXT in asked else {})}
        vectors = [*([self.image_column] if self.image else []), *self.text_columns.values()]
        self.columns = [self.stored, *vectors]
        pairs = _pairs_of(source, prefix)
        self._check_there(pairs)
        self.teachers = teachers_of(pairs, vectors[0]) if vectors else []
        self.width = sum(t.width for t in self.teachers)
        for column in vectors:
            self._check_vectors(pairs, column)
        for caption, column in self.text_columns.items():
            pairs.check_fresh(column, caption)
        made = _settings(pairs, self.stored).get("augment", {})
        self.augment = Augment(interpolation=made.get("interpolation", "bicubic"))

    def draw(self, row: Row, size: tuple[int, int], draw: Draw) -> tuple[int, Augmentation]:
        """One of the row's augmentations, and its place; raises `Unusable`."""
        stored = row[self.stored]
        if not stored:
            raise Unusable(f"no stored augmentation (leave out by where: {self.stored} IS NOT NULL)")
        index = int(draw() * len(stored))
        return index, from_stored(stored[index], size)

    def image_vector(self, row: Row, index: int) -> Vector:
        """(D,) of the augmentation at `index`. Raises `Unusable`, and `DataError` if there is not one for each."""
        return self._vector(row, self.image_column, index, len(row[self.stored]), "augmentations")

    def text_vectors(self, row: Row, picks: Sequence[Pick]) -> list[Vector]:
        """(D,) of each pick. Raises as `image_vector` does."""
        out = []
        for pick in picks:
            count = max(1, len(captions_of(pick.column, row[pick.column])))
            out.append(self._vector(row, self.text_columns[pick.column], pick.place, count, f"texts of {pick.column}"))
        return out

    def _vector(self, row: Row, column: str, index: int, count: int, what: str) -> Vector:
        vectors = row[column]
        if vectors is None:
            raise Unusable(f"{column} is null")
        if len(vectors) != count:
            raise DataError(
                f"{row['key']}: {column!r} holds {len(vectors)} vectors for {count} {what}, so they do not belong "
                f"together. {_again(self.prefix)}"
            )
        vector = np.asarray(vectors[index], np.float16)
        if not np.isfinite(vector).all():
            raise Unusable(f"{column} is not finite", f"vector {index}")
        return vector

    def _check_there(self, pairs: Any) -> None:
        missing = [c for c in self.columns if c not in pairs.columns]
        if not missing:
            return
        have = [c for c in pairs.columns if c.startswith(f"{self.prefix}_")]
        texts = f" --texts {','.join(self.text_columns)}" if self.text_columns else ""
        raise ConfigError(
            f"data.replay is {self.prefix!r}, and {pairs.path!r} has no column {', '.join(map(repr, missing))} "
            f"(of {self.prefix}_…: {', '.join(have) or 'none'}). Make them with: cutline reinforce {pairs.path} "
            f"--teachers … --as {self.prefix}{texts}"
        )

    def _check_vectors(self, pairs: Any, column: str) -> None:
        kind = pairs.schema.field(column).type
        width = getattr(getattr(kind, "value_type", None), "list_size", None)
        if width != self.width or [t.width for t in teachers_of(pairs, column)] != [t.width for t in self.teachers]:
            told = " + ".join(str(t.width) for t in self.teachers)
            raise DataError(
                f"the column {column!r} holds {kind}, and the teachers of {self.columns[1]!r} are {told} wide: the "
                f"vectors are not of the same teachers. {_again(self.prefix)}"
            )


def _pairs_of(source: Source, prefix: str) -> Any:
    from cutline.pairs import Pairs

    inner: Any = source.source if isinstance(source, Cached) else source
    if not isinstance(inner, Pairs):
        raise ConfigError(
            f"data.replay={prefix!r} needs a table of pairs, and the data are {type(inner).__name__}. Write them to a "
            "table first (`cutline scenes`, `cutline pairs create`)."
        )
    return inner


def _settings(pairs: Any, column: str) -> dict[str, Any]:
    provenance = pairs.provenance(column)
    return provenance.settings if provenance else {}


def _again(prefix: str) -> str:
    return f"Drop the columns of {prefix!r} and run `cutline reinforce` again."
