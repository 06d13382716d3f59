"""What all scores share: how their columns are named, and how one column of captions becomes texts and values again.

The score `clip` of a column written with the prefix `score_ours` is the column `score_ours_clip`. A column of strings
gets one value a row; a column of lists gets a list of values a row, one for each caption, in their order. Where there is
no caption (null, empty or blank) there is no score: null, which is no failure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cutline.captions.work import Row, is_list
from cutline.errors import ConfigError, DataError
from cutline.pairs import Pairs, Provenance

HOW = "caption score"  # in the provenance
Values = Mapping[str, Sequence[Any]]  # score → one value for each text


@dataclass(frozen=True)
class Asked:
    """Which scores of which column. prefix: of the new columns; many: whether the column holds lists; where: the filter
    of the rows that are scored, so that scores of some rows are not taken for those of all."""

    column: str
    prefix: str
    names: tuple[str, ...]
    many: bool
    where: str | None = None

    def writes(self, kinds: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
        return {name_of(self.prefix, n): pa.list_(kinds[n]) if self.many else kinds[n] for n in self.names}

    def texts(self, rows: Sequence[Row]) -> tuple[list[str], list[list[int]]]:
        """The captions of some rows, and for each row the places of its own among them, −1 for a blank one."""
        texts: list[str] = []
        places: list[list[int]] = []
        for row in rows:
            mine = []
            for text in listed(row[self.column]):
                if text and not text.isspace():
                    mine.append(len(texts))
                    texts.append(text)
                else:
                    mine.append(-1)
            places.append(mine)
        return texts, places

    def made(self, values: Values, places: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Values for each text → columns for each row."""
        columns = [(name_of(self.prefix, n), values[n]) for n in self.names]
        if self.many:
            return [{c: [v[p] if p >= 0 else None for p in mine] or None for c, v in columns} for mine in places]
        return [{c: v[mine[0]] if mine and mine[0] >= 0 else None for c, v in columns} for mine in places]


def name_of(prefix: str, score: str) -> str:
    return f"{prefix}_{score}"


def listed(value: Any) -> list[str | None]:
    """A cell of a text column as its captions."""
    return [value] if isinstance(value, str) else list(value or [])


def holds_lists(pairs: Pairs, column: str) -> bool:
    """Whether a text column holds lists of captions. Raises `DataError` if it is not there, or holds no text."""
    pairs.check_columns([column])
    kind = pairs.schema.field(column).type
    many = is_list(kind)
    inner = kind.value_type if many else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise DataError(f"the column {column!r} of {pairs.path!r} holds {kind}, not captions: name a column of text.")
    return many


def scored_column(provenance: Provenance | None) -> str | None:
    """The column that a column of scores is of; None for one that `cutline caption score` did not make."""
    if provenance is None or provenance.how != HOW:
        return None
    return str(provenance.settings.get("column"))


def provenance(asked: Asked, inputs: Sequence[str], model: str = "", **settings: Any) -> Provenance:
    settings |= {"column": asked.column, "scores": list(asked.names), "prefix": asked.prefix}
    settings |= {"where": asked.where} if asked.where else {}
    return Provenance(how=HOW, model=model, inputs=list(dict.fromkeys(inputs)), settings=settings)


def text_model(name: str, device: Any = "cpu") -> Any:
    """The model of that name (see `towers.load`); raises `ConfigError` if it has no text tower."""
    from cutline import towers

    model = towers.load(name, device)
    if not model.model_cfg:
        raise ConfigError(f"{name!r} is an image tower alone, and captions are scored with a text tower: name a CLIP.")
    return model
