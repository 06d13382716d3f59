"""Which text goes with a picture: columns with weights, and a rule.

`sample` draws one caption a step: a column by the weights, then one of its captions uniformly (VeCLIP, arXiv
2310.07699; LaCLIP, arXiv 2305.20088). `sum` gives one text per column, for a loss that is summed over columns
(MobileCLIP, arXiv 2311.17049). `all` gives every caption, for multi-positive losses. Null, empty and blank captions do
not count: the other columns stand in, and only where all are empty the text is "" (and counted).
"""

from bisect import bisect
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field
from torch import Tensor

from cutline.config import Config
from cutline.errors import ConfigError

Draw = Callable[[], float]  # the next number of a sample's generator, uniform in [0, 1)


class Tokenizer(Protocol):
    """What the stream needs of a tower's tokeniser; called from several threads."""

    def __call__(self, texts: list[str]) -> Tensor:
        """(M, context) int64."""

    def trimmed(self, tokens: Tensor) -> Tensor:
        """`tokens` without the columns that are padding in every text."""

    def truncated(self, texts: list[str], tokens: Tensor | None = None) -> int:
        """How many of `texts` were cut."""


class Pick(NamedTuple):
    """A caption that was chosen, and its place among those of its column that count (see `captions_of`)."""

    text: str
    column: str
    place: int


class TextConfig(Config):
    """columns: column → weight. max_texts: the most texts of one picture under `all` (a random subset, if more)."""

    columns: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"alt": 1.0}, min_length=1)
    rule: Literal["sample", "sum", "all"] = "sample"
    max_texts: int = Field(default=8, ge=1)

    @property
    def sources(self) -> list[str]:
        """Names of the `Texts` in a batch."""
        return list(self.columns) if self.rule == "sum" else ["text"]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source in the loss: the columns' own for `sum`, else 1."""
        return dict(self.columns) if self.rule == "sum" else {"text": 1.0}

    def choose(self, row: Mapping[str, Any], draw: Draw) -> dict[str, list[str]]:
        """The texts of one row by source. Each list has one entry, or up to `max_texts` under `all`."""
        return {source: [p.text for p in picks] for source, picks in self.pick(row, draw).items()}

    def pick(self, row: Mapping[str, Any], draw: Draw) -> dict[str, list[Pick]]:
        """What `choose` gives, with where each text stands in the row. "" is the first of the first column."""
        texts = {column: captions_of(column, row[column]) for column in self.columns}
        nothing = Pick("", next(iter(self.columns)), 0)
        if self.rule == "all":
            every = [Pick(t, c, i) for c, found in texts.items() for i, t in enumerate(found)] or [nothing]
            while len(every) > self.max_texts:
                every.pop(int(draw() * len(every)))
            return {"text": every}
        filled = {c: self.columns[c] for c, found in texts.items() if found}
        if self.rule == "sample":
            return {"text": [_one(texts, filled, nothing, draw)]}
        return {c: [_one(texts, {c: 1.0} if c in filled else filled, nothing, draw)] for c in self.columns}


def captions_of(column: str, value: Any) -> list[str]:
    """The captions of a row's value that count: neither null, nor empty, nor blank. `ConfigError` for what is no text."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(t is None or isinstance(t, str) for t in texts):
        raise ConfigError(f"the column {column!r} holds no text but {value!r}: take it out of data.text.columns.")
    return [t for t in texts if t and not t.isspace()]


def _one(texts: Mapping[str, list[str]], weights: Mapping[str, float], nothing: Pick, draw: Draw) -> Pick:
    """A caption of a column chosen by weight; always two draws, so that later draws do not shift."""
    at, which = draw(), draw()
    if not weights:
        return nothing
    sums = list(accumulate(weights.values()))
    column = list(weights)[min(bisect(sums, at * sums[-1]), len(sums) - 1)]
    index = int(which * len(texts[column]))
    return Pick(texts[column][index], column, index)
