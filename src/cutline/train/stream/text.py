"""Which text goes with a picture: columns with weights, and a rule.

`sample` draws one caption a step: a column by the weights, then one of its captions uniformly (VeCLIP, arXiv
2310.07699; LaCLIP, arXiv 2305.20088). `sum` gives one text per column, for a loss that is summed over columns
(MobileCLIP, arXiv 2311.17049). `all` gives every caption, for multi-positive losses. Null, empty and blank captions do
not count: the other columns stand in, and only where all are empty the text is "" (and counted).
"""

from bisect import bisect
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, Protocol

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
        texts = {column: _texts(column, row[column]) for column in self.columns}
        if self.rule == "all":
            every = [t for column in texts.values() for t in column] or [""]
            while len(every) > self.max_texts:
                every.pop(int(draw() * len(every)))
            return {"text": every}
        filled = {c: self.columns[c] for c, found in texts.items() if found}
        if self.rule == "sample":
            return {"text": [_one(texts, filled, draw)]}
        return {c: [_one(texts, {c: 1.0} if c in filled else filled, draw)] for c in self.columns}


def _texts(column: str, value: Any) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(t is None or isinstance(t, str) for t in texts):
        raise ConfigError(f"the column {column!r} holds no text but {value!r}: take it out of data.text.columns.")
    return [t for t in texts if t and not t.isspace()]


def _one(texts: Mapping[str, list[str]], weights: Mapping[str, float], draw: Draw) -> str:
    """A caption of a column chosen by weight; always two draws, so that later draws do not shift."""
    at, which = draw(), draw()
    if not weights:
        return ""
    sums = list(accumulate(weights.values()))
    column = list(weights)[min(bisect(sums, at * sums[-1]), len(sums) - 1)]
    return texts[column][int(which * len(texts[column]))]
