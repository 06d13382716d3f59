"""Choosing captions by their scores: each rule gives a column, and changes none.

where         the captions of one column in the rows that a Lance filter lets through
top-fraction  the best captions of one column: a share of them, by a score (DataComp's CLIP score filter, 2304.14108)
best-of       in each row the best caption of several columns, by a score of each; NAME_from says which column it is of
alip          weights instead of a choice: ALIP's sample and pair weights (2308.08428), for the objective's `weights`
              (see `objectives.contrastive`)

What a rule needs to know of the whole column (a threshold, means) is taken from the scores in one pass before, is noted
in the provenance, and every row is then decided alone. A score that is null or NaN is never chosen.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cutline.captions.score.base import holds_lists, listed, scored_column
from cutline.captions.work import Made, Row, Work, Worker, is_list
from cutline.config import Config
from cutline.errors import DataError
from cutline.pairs import Pairs, Provenance

Rule = Literal["where", "top-fraction", "best-of", "alip"]


class SelectConfig(Config):
    """rule: see above. columns: of captions: one for where and top-fraction, several for best-of, the raw text and the
    caption for alip. by: of scores: one for top-fraction, one for each column for best-of; for alip the cosines of
    picture and raw text, picture and caption, raw text and caption. fraction: of the scored captions; where: a filter.
    """

    rule: Rule
    columns: list[str] = Field(min_length=1)
    by: list[str] = Field(default_factory=list)
    fraction: float | None = Field(None, gt=0, le=1)
    where: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "SelectConfig":
        wanted = {  # columns, scores
            "where": (1, 0), "top-fraction": (1, 1), "best-of": (len(self.columns), len(self.columns)), "alip": (2, 3),
        }[self.rule]  # fmt: skip
        if (len(self.columns), len(self.by)) != wanted:
            raise ValueError(
                f"the rule {self.rule} takes {wanted[0]} columns and {wanted[1]} scores, and was given "
                f"{len(self.columns)} and {len(self.by)}"
            )
        if (self.where is not None) != (self.rule == "where"):
            raise ValueError("a filter belongs to the rule where, and that rule needs one: --where 'width >= 64'")
        if (self.fraction is not None) != (self.rule == "top-fraction"):
            raise ValueError("a fraction belongs to the rule top-fraction, and that rule needs one: --fraction 0.3")
        return self


@dataclass(frozen=True)
class Choice:
    """A rule as a `Work`. decide: one row → one value for each of `kinds`; known: what it knows of the whole set."""

    config: SelectConfig
    kinds: Mapping[str, pa.DataType]
    decide: Callable[[Row], Sequence[Any]]
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        texts = [] if self.config.rule == "alip" else self.config.columns
        return list(dict.fromkeys([*texts, *self.config.by]))

    @property
    def writes(self) -> dict[str, pa.DataType]:
        return dict(self.kinds)

    def provenance(self) -> Provenance:
        settings = self.config.model_dump(mode="json", exclude_none=True, exclude={"columns"}) | dict(self.known)
        inputs = list(dict.fromkeys([*self.config.columns, *self.config.by]))
        return Provenance(how="caption select", inputs=inputs, settings=settings)

    def load(self) -> Worker:
        return _Deciding(self)


class _Deciding(Worker):
    def __init__(self, work: Choice) -> None:
        self.names, self.decide = list(work.kinds), work.decide

    def make(self, prepared: list[Row]) -> Made:
        return [dict(zip(self.names, self.decide(row), strict=True)) for row in prepared]


def select(pairs: Pairs, config: SelectConfig, name: str) -> tuple[Pairs, Work]:
    """The work that makes the column `name` (see above for further ones), and the rows to run it over.

    Raises `DataError` for columns that are not there, are no text or no scores, or scores that do not compare.
    """
    for column in config.columns:
        holds_lists(pairs, column)
    for column in config.by:
        _check_score(pairs, column)
    if config.rule == "where":
        return pairs.where(config.where or ""), _where(pairs, config, name)
    rule = {"top-fraction": _top_fraction, "best-of": _best_of, "alip": _alip}[config.rule]
    return pairs, rule(pairs, config, name)


def _where(pairs: Pairs, config: SelectConfig, name: str) -> Choice:
    (column,) = config.columns
    for score in (c for c in pairs.columns if re.search(rf"\b{re.escape(c)}\b", config.where or "")):
        pairs.check_fresh(score, column)
    return Choice(config, {name: pairs.schema.field(column).type}, Copy(column))


@dataclass(frozen=True)
class Copy:
    """The captions as they are (the rows outside the filter are not worked on)."""

    column: str

    def __call__(self, row: Row) -> tuple[Any]:
        return (row[self.column],)


def _top_fraction(pairs: Pairs, config: SelectConfig, name: str) -> Choice:
    """Exactly round(fraction · captions with a score) captions: all above a threshold, and so many of those at it.

    Among captions with equal scores the choice is by a hash of the row's key, so it does not prefer the beginning of the
    table. In a column of lists every caption counts by itself, and a row keeps those that are chosen.
    """
    (column,), (by,) = config.columns, config.by
    many = _same_shape(pairs, column, by)
    values = np.concatenate([*_scores(pairs, by, of=column), np.empty(0)])
    if not len(values):
        raise DataError(f"no caption has a score in {by!r}, so there is no best fraction of them.")
    count = max(1, math.floor((config.fraction or 0) * len(values) + 0.5))
    values.partition(len(values) - count)
    threshold = float(values[len(values) - count])
    more = count - int((values > threshold).sum())  # of those at the threshold
    ties = int((values == threshold).sum())
    last = (
        2**64 - 1 if more == ties else int(np.partition(_hashes_at(pairs, by, column, threshold), more - 1)[more - 1])
    )
    known = {"threshold": threshold, "chosen": count, "of": len(values), "ties": ties, "last": f"{last:016x}"}
    rule = Above(column, by, threshold, last, many)
    return Choice(config, {name: pairs.schema.field(column).type}, rule, known)


@dataclass(frozen=True)
class Above:
    """The captions whose score is above the threshold, or at it with a hash up to `last`."""

    column: str
    by: str
    threshold: float
    last: int
    many: bool

    def __call__(self, row: Row) -> tuple[Any]:
        captions, scores = listed(row[self.column]), _listed(row[self.by])
        kept = [c for i, (c, s) in enumerate(zip(captions, scores, strict=False)) if self._passes(row["key"], i, s)]
        return ((kept or None) if self.many else (kept[0] if kept else None),)

    def _passes(self, key: str, place: int, score: float | None) -> bool:
        if score is None or score != self.threshold:
            return score is not None and score > self.threshold
        return _hash(key, place) <= self.last


def _best_of(pairs: Pairs, config: SelectConfig, name: str) -> Choice:
    """The caption with the highest score of all columns; of equal ones the first, in the order of the columns."""
    for column, by in zip(config.columns, config.by, strict=True):
        _same_shape(pairs, column, by)
    _check_comparable(pairs, config.by, "score", "prompt")
    kinds = {name: pa.string(), f"{name}_from": pa.string()}
    return Choice(config, kinds, Best(tuple(config.columns), tuple(config.by)))


@dataclass(frozen=True)
class Best:
    """The best caption and its column, or two nulls."""

    columns: tuple[str, ...]
    by: tuple[str, ...]

    def __call__(self, row: Row) -> tuple[str | None, str | None]:
        best: tuple[str | None, str | None] = (None, None)
        highest = -math.inf
        for column, by in zip(self.columns, self.by, strict=True):
            for caption, score in zip(listed(row[column]), _listed(row[by]), strict=False):
                if caption and score is not None and score > highest:
                    best, highest = (caption, column), score
        return best


def _alip(pairs: Pairs, config: SelectConfig, name: str) -> Choice:
    """ALIP's weights, as its authors' train.py computes them: with s = picture · raw, picture · caption, raw · caption

        g(s) = exp(s − mean(s))²,  w_sample = min(1, g(raw · caption)),
        w_pair = g(picture · raw) or g(picture · caption) where g(raw · caption) < 1, else 1

    and columns NAME_RAW, NAME_CAPTION = w_sample · w_pair. ALIP takes cosines of the model in training, and for the mean
    an average that follows the batches, since the model moves. Here a fixed CLIP has scored the whole set, so the mean
    is that of the set: what such an average estimates.
    """
    for column in (*config.columns, *config.by):
        if is_list(pairs.schema.field(column).type):
            raise DataError(f"the rule alip weighs one raw text and one caption a row, and {column!r} holds lists.")
    raw, caption = config.columns
    for by, score, column in zip(config.by, ("cosine", "cosine", "alt_cosine"), (raw, caption, caption), strict=True):
        _check_cosine(pairs, by, score, column)
    _check_comparable(pairs, config.by)
    means = []
    for by in config.by:
        total, count = 0.0, 0
        for values in _scores(pairs, by):
            if (np.abs(values) > 1.001).any():
                raise DataError(
                    f"{by!r} holds no cosines (there is {values[np.abs(values).argmax()]:g}), which alip weighs by."
                )
            total, count = total + float(values.sum()), count + len(values)
        if not count:
            raise DataError(f"no row has a score in {by!r}, so it gives no weights.")
        means.append(total / count)
    kinds = {f"{name}_{column}": pa.float32() for column in config.columns}
    return Choice(config, kinds, Alip(tuple(config.by), tuple(means)), {"means": means})


@dataclass(frozen=True)
class Alip:
    """Weights of raw text and caption; null where a cosine is missing, which the objective counts as 1."""

    by: tuple[str, ...]
    means: tuple[float, ...]

    def __call__(self, row: Row) -> tuple[float | None, float | None]:
        cosines = [row[by] for by in self.by]
        if any(c is None or math.isnan(c) for c in cosines):
            return None, None
        raw, caption, both = (math.exp(c - mean) ** 2 for c, mean in zip(cosines, self.means, strict=True))
        return (raw * both, caption * both) if both < 1 else (1.0, 1.0)


def _scores(pairs: Pairs, column: str, of: str | None = None) -> Iterator[NDArray[np.float64]]:
    """The scores that are there, without null and NaN, batch by batch; of lists all elements.

    of: a column of captions; rows without one do not count.
    """
    scanner = pairs.dataset.scanner(columns=list(dict.fromkeys([column, of or column])), filter=pairs.filter)
    for batch in scanner.to_batches():
        values = batch[column] if of is None else batch[column].filter(batch[of].is_valid())
        if is_list(values.type):
            values = values.flatten()
        numbers = values.drop_null().cast(pa.float64()).to_numpy(zero_copy_only=False)
        yield numbers[~np.isnan(numbers)]


def _hashes_at(pairs: Pairs, column: str, of: str, score: float) -> NDArray[np.uint64]:
    """The hashes of the captions (in the column `of`) that have exactly this score; 8 bytes each."""
    found = [np.empty(0, np.uint64)]
    for batch in pairs.dataset.scanner(columns=["key", column, of], filter=pairs.filter).to_batches():
        there = batch.filter(batch[of].is_valid())
        keys, cells = there["key"], there[column].to_pylist()
        at = [(r, i) for r, cell in enumerate(cells) for i, s in enumerate(_listed(cell)) if s == score]
        found.append(np.array([_hash(keys[r].as_py(), i) for r, i in at], np.uint64))
    return np.concatenate(found)


def _hash(key: str, place: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{place}:{key}".encode(), digest_size=8).digest(), "big")


def _listed(value: Any) -> Sequence[Any]:
    """A cell of a score column as the scores of its captions."""
    return value if isinstance(value, list) else [value]


def _check_score(pairs: Pairs, column: str) -> None:
    pairs.check_columns([column])
    kind = pairs.schema.field(column).type
    inner = kind.value_type if is_list(kind) else kind
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
        raise DataError(f"the column {column!r} of {pairs.path!r} holds {kind}, not scores: name a column of numbers.")


def _check_cosine(pairs: Pairs, by: str, score: str, column: str) -> None:
    """Raise `DataError` if `by` is known not to be this score of `column`."""
    made = pairs.provenance(by)
    scored = scored_column(made)
    if made is not None and scored is not None:
        name = by.removeprefix(f"{made.settings.get('prefix', '')}_")
        if (name, scored) != (score, column):
            raise DataError(
                f"alip weighs by the cosines of picture and raw text, picture and caption, raw text and caption, in this order, "
                f"and {by!r} is {name} of {scored!r} where {score} of {column!r} belongs. Make it with: cutline caption score "
                f"--column {column} --with MODEL --only cosine,alt_cosine"
            )


def _same_shape(pairs: Pairs, column: str, by: str) -> bool:
    """Whether both hold lists; raises `DataError` if `by` cannot be, or is known not to be, the scores of `column`."""
    many = holds_lists(pairs, column)
    if is_list(pairs.schema.field(by).type) != many:
        raise DataError(
            f"{by!r} does not hold the scores of {column!r}: one has a list in each row, the other has not."
        )
    scored = scored_column(pairs.provenance(by))
    if scored not in (None, column):
        raise DataError(f"{by!r} does not hold the scores of {column!r}, but of {scored!r}.")
    pairs.check_fresh(by, column)
    return many


def _check_comparable(pairs: Pairs, columns: Sequence[str], *more: str) -> None:
    """Raise `DataError` for scores by different models, which say nothing of each other's captions; `more` is what else
    must be the same of how they were made: "score" (its name), "prompt"."""
    ways: dict[str, dict[str, Any]] = {}
    for column in columns:
        made = pairs.provenance(column)
        if made is not None and scored_column(made) is not None:
            score = column.removeprefix(f"{made.settings.get('prefix', '')}_")
            way = {"model": made.model, "score": score, **made.settings}
            ways[column] = {k: way.get(k) for k in ("model", "weights", *more)}
    first = next(iter(ways), "")
    for column, way in ways.items():
        differ = [f"{k} {ways[first][k]!r} against {v!r}" for k, v in way.items() if v != ways[first][k]]
        if differ:
            raise DataError(
                f"the scores {first!r} and {column!r} do not compare: {'; '.join(differ)}. Score both in the same way."
            )
