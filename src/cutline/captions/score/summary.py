"""What the scores of a column say of the whole set: `summarise` reads them back in one pass and sums them up.

Numbers get mean, spread and quantiles, flags their share, languages a count; from the texts come vocabulary, distinct-n
and duplicates. On scenes the truth is summed over all captions (micro-averages), and each score is judged by how it
ranks the captions: Spearman's correlation with the truth.

Memory: 4 bytes a caption for each number (on scenes, where scores are judged, for each flag too), some 12 more while one of
them is summed up, and 32 MiB for the vocabulary.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from cutline.captions.score import truth
from cutline.captions.score.base import holds_lists, name_of, scored_column
from cutline.captions.score.distinct import Vocabulary
from cutline.captions.score.plan import SCORES
from cutline.config import Config
from cutline.errors import DataError
from cutline.pairs import Pairs
from cutline.record import write_atomic

Floats = NDArray[np.float32]
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
JUDGES = ("object_f1", "object_precision", "object_recall", "relation_precision")  # what scores are judged by
BATCH = 65_536


class Numbers(Config):
    """count: of captions that have the score; quantiles: share → value."""

    count: int
    mean: float
    deviation: float
    least: float
    quantiles: dict[str, float]
    most: float


class Summary(Config):
    """captions: that are not blank, in how many of the rows; words: of all; vocabulary: different ones; distinct: n →
    distinct-n; duplicates: share of captions that another one repeats word for word; exact: whether the counts of
    different things are (see `distinct.Distinct`); flags: share of captions; truth: micro-averages; spearman: score →
    truth → correlation (None where one of both is the same everywhere)."""

    table: str
    fingerprint: str
    column: str
    prefix: str
    rows: int
    with_caption: int = 0
    captions: int = 0
    words: int = 0
    vocabulary: int = 0
    distinct: dict[str, float | None] = Field(default_factory=dict)
    duplicates: float | None = None
    exact: bool = True
    numbers: dict[str, Numbers] = Field(default_factory=dict)
    flags: dict[str, float] = Field(default_factory=dict)
    languages: dict[str, int] = Field(default_factory=dict)
    truth: dict[str, float | None] = Field(default_factory=dict)
    spearman: dict[str, dict[str, float | None]] = Field(default_factory=dict)

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*_head(self), *_tables(self))


def summarise(pairs: Pairs, column: str, prefix: str, out: str | Path | None = None) -> Summary:
    """Sum up the scores PREFIX_… of a column over the rows of `pairs`.

    out: a folder to write `summary.json` and the plot `scores.png` into. Raises `DataError` if there are no scores.
    """
    many = holds_lists(pairs, column)
    there = [n for n in SCORES if name_of(prefix, n) in pairs.columns]
    found = [n for n in there if scored_column(pairs.provenance(name_of(prefix, n))) == column]
    if not found:
        raise DataError(f"{pairs.path!r} has no scores {prefix}_… of {column!r}. Make them with cutline caption score.")
    summary = Summary(
        table=pairs.path, fingerprint=pairs.fingerprint, column=column, prefix=prefix, rows=len(pairs)
    )  # fmt: skip
    read = _Read(found, many)
    names = [name_of(prefix, n) for n in found]
    for batch in pairs.dataset.scanner(columns=[column, *names], filter=pairs.filter, batch_size=BATCH).to_batches():
        read.add(batch[column], {n: batch[name_of(prefix, n)] for n in found})
    read.sum_up(summary)
    if out is not None:
        from cutline.captions.score.plot import draw

        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out) / "summary.json", json.dumps(summary.model_dump(), indent=2).encode())
        write_atomic(Path(out) / "scores.png", draw(summary, read.values()))
    return summary


class _Read:
    """Captions and scores as they come; scores as float32, one for each caption, NaN where there is none."""

    def __init__(self, names: list[str], many: bool) -> None:
        self.many, self.rows_with, self.vocabulary = many, 0, Vocabulary()
        self.languages: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.parts: dict[str, list[Floats]] = {n: [] for n in names if n not in ("language", "counts")}
        self.judged = any(n in names for n in JUDGES)
        self.flags: dict[str, tuple[int, int]] = {}  # score → captions that have it set, captions that have it

    def add(self, captions: pa.Array, scores: dict[str, pa.Array]) -> None:
        flat, lengths = captions, np.ones(len(captions), np.int64)
        if self.many:
            flat = captions.flatten()
            lengths = pc.list_value_length(captions).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        self.vocabulary.add(flat)
        here = pc.not_equal(pc.utf8_trim_whitespace(flat), "").fill_null(False).to_numpy(zero_copy_only=False)
        self.rows_with += len(np.unique(np.repeat(np.arange(len(lengths)), lengths)[here]))
        for name, column in scores.items():
            values = column.flatten() if self.many else column
            if name == "language":
                self.languages.update(values.drop_null().to_pylist())
            elif name == "counts":
                present = values.drop_null()
                self.counts.update({c: pc.sum(pc.struct_field(present, c)).as_py() or 0 for c in truth.COUNTS})
            else:
                if flag := pa.types.is_boolean(values.type):
                    there, given = self.flags.get(name, (0, 0))
                    self.flags[name] = there + (pc.sum(values).as_py() or 0), given + len(values) - values.null_count
                if self.judged or not flag:
                    self.parts[name].append(self._aligned(values, column, lengths))

    def _aligned(self, values: pa.Array, column: pa.Array, lengths: NDArray[np.int64]) -> Floats:
        """One value for each caption, also where a row has no list (its picture could not be read)."""
        numbers: Floats = values.cast(pa.float32()).to_numpy(zero_copy_only=False)
        if not self.many:
            return numbers
        out = np.full(int(lengths.sum()), np.nan, np.float32)
        out[np.repeat(column.is_valid().to_numpy(zero_copy_only=False), lengths)] = numbers
        return out

    def values(self) -> dict[str, Floats]:
        """Score → values of all captions. The parts are let go of, so that memory is that of one copy."""
        for name, parts in self.parts.items():
            self.parts[name] = [np.concatenate(parts) if parts else np.empty(0, np.float32)]
        return {name: parts[0] for name, parts in self.parts.items()}

    def sum_up(self, summary: Summary) -> None:
        v, values = self.vocabulary, self.values()
        summary.with_caption, summary.captions = self.rows_with, v.captions.total
        summary.words, summary.vocabulary = v.ngrams[1].total, v.ngrams[1].count
        summary.distinct = {str(n): d.share for n, d in v.ngrams.items()}
        summary.duplicates = None if v.captions.share is None else 1 - v.captions.share
        summary.exact = not any(d.full for d in (v.captions, *v.ngrams.values()))
        summary.languages = dict(self.languages.most_common())
        for name, numbers in values.items():
            present = numbers[~np.isnan(numbers)]
            if name not in self.flags and len(present):
                summary.numbers[name] = _numbers(present)
        summary.flags = {name: there / given for name, (there, given) in self.flags.items() if given}
        if self.counts:
            summary.truth = {n: s for n, s in truth.scores(self.counts).items() if n != "counts"}
        judges = [n for n in JUDGES if n in values]
        for name in (n for n in values if n not in truth.KINDS and judges):
            summary.spearman[name] = {judge: spearman(values[name], values[judge]) for judge in judges}


def _numbers(values: Floats) -> Numbers:
    cuts = np.quantile(values, QUANTILES)
    return Numbers(
        count=len(values), mean=float(values.mean(dtype=np.float64)), deviation=float(values.std(dtype=np.float64)),
        least=float(values.min()), quantiles={f"{q:g}": float(c) for q, c in zip(QUANTILES, cuts, strict=True)},
        most=float(values.max()),
    )  # fmt: skip


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation of two scores where both are there (not NaN); equal values share their mean rank.

    None for less than three captions, and where one of both is constant. (torchmetrics sums ranks in 32 bits, which
    overflow when tens of thousands of values are equal, as flags are.)
    """
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        return None
    x, y = _ranks(a[both]), _ranks(b[both])
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None


def _ranks(values: Floats) -> NDArray[np.float64]:
    """Ranks from 1; the mean rank for equal values."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: NDArray[np.float64] = (last - (count - 1) / 2)[place]
    return ranks


def _head(s: Summary) -> list[str]:
    distinct = ", ".join(f"distinct-{n} {d:.3f}" for n, d in s.distinct.items() if d is not None)
    about = "" if s.exact else " (different ones estimated, error about 0.1 %)"
    lines = [
        f"[bold]{s.column}[/bold]: {s.captions:,} captions in {s.with_caption:,} of {s.rows:,} rows",
        f"{s.words:,} words, {s.vocabulary:,} different; {distinct}; {s.duplicates or 0:.1%} duplicates{about}",
    ]
    if s.flags:
        lines.append("; ".join(f"{name} {share:.1%}" for name, share in s.flags.items()))
    if s.languages:
        lines.append("language: " + ", ".join(f"{code} {n:,}" for code, n in list(s.languages.items())[:8]))
    if s.truth:
        shares = (f"{n.replace('_', ' ')} {v:.1%}" for n, v in s.truth.items() if v is not None)
        lines.append("over the set: " + "; ".join(shares))
    return lines


def _tables(s: Summary) -> list[Any]:
    from rich.table import Table

    tables = []
    if s.numbers:
        shown = ("0.05", "0.5", "0.95")  # all of them stand in the file; these fit 80 characters
        table = Table("score", "captions", "mean", "±", *(f"{float(q):.0%}" for q in shown))
        for name, n in s.numbers.items():
            cells = (n.mean, n.deviation, *(n.quantiles[q] for q in shown))
            table.add_row(name.replace("_", " "), f"{n.count:,}", *(f"{c:.3g}" for c in cells))
        tables.append(table)
    if s.spearman:
        judges = list(next(iter(s.spearman.values())))
        table = Table("Spearman's ρ with the truth", *(j.replace("_", " ") for j in judges))
        for name, by in s.spearman.items():
            if all(v is None for v in by.values()):
                continue  # the same for every caption
            table.add_row(name, *("–" if by[j] is None else f"{by[j]:+.3f}" for j in judges))
        tables.append(table)
    return tables
