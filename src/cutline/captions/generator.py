"""What asks a model for text, whatever the model: the questions, how answers are sampled, and the worker around it.

A row becomes one or more `Ask`s (a prompt, for writers with the picture); a `Generator` (transformers in this process, or
a server) answers them; the answers are cleaned, and become the value of the row. Writers and fusers differ only in what
they ask.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from pydantic import Field

from cutline.captions.clean import clean
from cutline.captions.work import Failed, Row, Worker
from cutline.config import Config
from cutline.errors import ConfigError, DataError


@dataclass(frozen=True)
class Ask:
    """One question. key: of the row, by which what is drawn at random is seeded, so it is the same at every start.

    picture: upright RGB; encoded: its bytes as they are stored, where a server can be sent these as they are.
    """

    key: str
    prompt: str
    picture: Image.Image | None = None
    encoded: bytes | None = None


class Sampling(Config):
    """How answers are drawn. num: answers for each row; max_new_tokens: of an answer, in the model's own tokens.

    temperature: 0 takes the likeliest token each time (greedy); None is 0 for one answer and 1 for several, which would
    be the same one otherwise. top_p: nucleus (0.9 as in DataCompDR). seed: of all that is drawn.
    """

    num: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(100, ge=1)
    seed: int = 0

    @property
    def heat(self) -> float:
        """The temperature, chosen where it was left open."""
        return self.temperature if self.temperature is not None else float(self.num > 1)

    def noted(self) -> dict[str, Any]:
        """For the provenance: what has an influence."""
        always = {"num": self.num, "temperature": self.heat, "max_new_tokens": self.max_new_tokens}
        return always | ({"top_p": self.top_p, "seed": self.seed} if self.heat else {})


Answers = Sequence[Sequence[str | Failed] | Failed]  # for each ask its answers, or why there are none


class Generator(Protocol):
    """A model that is loaded. tokens: generated (by a server: used) so far."""

    tokens: int

    def prepare(self, asks: list[Ask]) -> Any:
        """What can be done while the model is at other asks."""

    def answer(self, prepared: Any) -> Answers:
        """Raises `CutlineError` where no ask can be answered (a server that is away)."""


class AskWorker(Worker):
    """Asks a generator about rows.

    asks_of: a row → its asks, or its text where nothing need be asked, or why there is none. many: the column holds all
    answers of a row as a list, else the first. limit: tokens of CLIP's tokeniser.
    """

    def __init__(
        self,
        generator: Generator,
        asks_of: Callable[[Row], list[Ask] | str | Failed],
        column: str,
        many: bool,
        limit: int,
    ) -> None:
        self.generator, self.asks_of, self.column, self.many, self.limit = generator, asks_of, column, many, limit
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")  # decoding leaves Python's lock free

    def prepare(self, rows: list[Row]) -> tuple[list[list[Ask] | str | Failed], Any]:
        plan = list(self.pool.map(self.asks_of, rows))
        asks = [ask for asked in plan if isinstance(asked, list) for ask in asked]
        return plan, self.generator.prepare(asks) if asks else None

    def make(self, prepared: tuple[list[list[Ask] | str | Failed], Any]) -> list[Mapping[str, Any] | Failed]:
        plan, asked = prepared
        answers = iter(self.generator.answer(asked) if asked is not None else [])
        self.tokens = self.generator.tokens
        return [self._value([next(answers) for _ in p] if isinstance(p, list) else p) for p in plan]

    def _value(self, got: "list[Sequence[str | Failed] | Failed] | str | Failed") -> Mapping[str, Any] | Failed:
        """Of a row: its clean answers, each once, or why there is none, or why some may yet be had."""
        if isinstance(got, Failed):
            return got
        if isinstance(got, str):
            return {self.column: [got] if self.many else got}
        flat = [answer for answers in got for answer in ([answers] if isinstance(answers, Failed) else answers)]
        cleaned = [a if isinstance(a, Failed) else clean(a, self.limit) for a in flat]
        failed = [c for c in cleaned if isinstance(c, Failed)]
        if lost := [f for f in failed if f.again]:  # else a busy server would leave rows with fewer answers, unsaid
            return lost[0]
        good = list(dict.fromkeys(c for c in cleaned if isinstance(c, str)))
        if not good:
            return failed[0] if failed else Failed("empty")
        return {self.column: good if self.many else good[0]}


def brief(said: object) -> str:
    """An error's text on one short line and without numbers, so that equal reasons are counted as one."""
    text = str(said).encode("utf-8", "replace").decode()  # a half of a surrogate could not be stored
    return re.sub(r"\d+", "#", " ".join(text.split()))[:100]


def demand_texts(row: Row, columns: Sequence[str]) -> None:
    """Raise `DataError` for a column that holds neither texts nor lists of texts, such as a width or a picture."""
    for name in columns:
        value = row[name]
        first = next((v for v in value if v is not None), None) if isinstance(value, list) else value
        if first is not None and not isinstance(first, str):
            raise DataError(
                f"the column {name!r} holds no text, but a {type(first).__name__}. Name columns of text with --inputs."
            )


def text_of(path: str | Path, todo: str = "Check the path.") -> str:
    """The text of a prompt file; raises `ConfigError` if it cannot be read (todo: what to do then) or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the prompt file {str(path)!r}: {reason}. {todo}") from e
    if not text:
        raise ConfigError(f"the prompt file {str(path)!r} is empty. Write into it what the model shall be asked.")
    return text
