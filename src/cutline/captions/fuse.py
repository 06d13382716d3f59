"""Fusing the texts of a row into one by a language model: alt text knows names, a caption knows what is seen.

Prompts are text files with placeholders. Those of the package, in our own words, are

- `veclip` (VeCLIP, arXiv 2310.07699): rephrase alt text and caption into one short sentence;
- `capsfusion` (CapsFusion, arXiv 2310.20550): the structure of the caption with the real-world knowledge of the alt text;
- `laclip` (LaCLIP, arXiv 2305.20088): rewrite one text after examples, in one of four styles.

They speak of {text} and {caption}, which are the first and the second of `inputs`; `laclip` speaks of {text} alone, which
is all inputs, joined. A prompt file of the user's own names the columns themselves, such as {alt} and {caption_ours}, or
all of them as {*}; {{ and }} stand for braces. Lines of three dashes part a file into several prompts (styles): each row
takes one of them, by its key, or with `num` answers the first `num` of them.

Of a column of lists the first text is taken: the others are further captions of the same picture. A text that is a file
name or boilerplate ("click to enlarge") says nothing, and counts as missing. Where a prompt wants several texts and only
one is there, that text is the result, and no model is asked.
"""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from cutline import record
from cutline.captions.clean import CONTEXT, tidy
from cutline.captions.generator import Ask, AskWorker, Sampling, demand_texts, text_of
from cutline.captions.rules import texts_of
from cutline.captions.vlm import Source
from cutline.captions.work import Failed, Row
from cutline.config import Config
from cutline.errors import ConfigError
from cutline.pairs import Provenance

PROMPTS = ("veclip", "laclip", "capsfusion")
ALL = "*"
STYLES = re.compile(r"^-{3,}[ \t]*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([\w.-]+|\*)\}")
MISSING = "(none)"  # where one of three or more texts is missing


def read_prompts(name: str, inputs: Sequence[str]) -> list[str]:
    """The prompts of `name`, one of `PROMPTS` or a file, with placeholders that are columns of `inputs`.

    Raises `ConfigError` for a file that cannot be read, and for prompts that do not fit the inputs.
    """
    if name not in PROMPTS:
        prompts = _parts(text_of(name, f"Check the path, or take one of {', '.join(PROMPTS)}."))
        check_prompts(prompts, inputs, f"the prompt file {name!r}")
        return prompts
    file = importlib.resources.files("cutline.captions") / "prompts" / f"{name}.txt"
    prompts = _parts(file.read_text(encoding="utf-8"))
    if "caption" not in placeholders(prompts):
        named = {"text": ALL}
    elif len(inputs) == 2:
        named = {"text": inputs[0], "caption": inputs[1]}
    else:
        raise ConfigError(f"the prompt {name!r} fuses two texts, and inputs={','.join(inputs)} are {len(inputs)}.")
    return [_filled(p, {old: f"{{{new}}}" for old, new in named.items()}) for p in prompts]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in STYLES.split(text) if part.strip()]


def placeholders(prompts: Sequence[str]) -> list[str]:
    """Their names, in the order in which they come, each once."""
    return list(dict.fromkeys(m[1] for prompt in prompts for m in PLACEHOLDER.finditer(prompt) if m[1]))


def _filled(prompt: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda m: values[m[1]] if m[1] else m[0][0], prompt)


def check_prompts(prompts: Sequence[str], inputs: Sequence[str], what: str) -> None:
    """Raise `ConfigError` for a prompt without placeholders or with unknown ones, and for inputs that none speaks of."""
    names = placeholders(prompts)
    likely = " and ".join(f"{{{i}}}" for i in inputs)
    if not all(placeholders([prompt]) for prompt in prompts):
        raise ConfigError(f"{what} has no placeholders. Write {likely} where the texts of a row shall stand.")
    if unknown := [n for n in names if n not in (*inputs, ALL)]:
        raise ConfigError(
            f"{what} speaks of {', '.join(f'{{{n}}}' for n in unknown)}, and the inputs are {', '.join(inputs)}. "
            "Name that column with --inputs, or double the braces ({{ }}) if they are none of a placeholder."
        )
    if ALL not in names and (unused := [i for i in inputs if i not in names]):
        raise ConfigError(
            f"{what} never speaks of the input {unused[0]!r}. Write {{{unused[0]}}} into it, or leave it out."
        )


class FuseWork(Config):
    """A `Work` that fuses the columns `inputs` into the column `column`.

    prompts: of `read_prompts`. sampling.num: answers for each row, from one prompt after the other; the column then holds
    lists. sampling.temperature: None is 0, or 1 if there are more answers than prompts. limit: as of `VlmWriter`.
    """

    source: Source
    column: str = Field(min_length=1)
    inputs: list[str] = Field(min_length=1)
    prompts: list[str] = Field(min_length=1)
    sampling: Sampling = Sampling()
    limit: int = Field(CONTEXT, ge=3)

    def model_post_init(self, context: Any) -> None:
        check_prompts(self.prompts, self.inputs, "the prompt")
        if self.sampling.num > len(self.prompts) and self.sampling.temperature == 0:
            raise ConfigError(
                f"num={self.sampling.num} answers to {len(self.prompts)} prompts are the same ones again with temperature=0. "
                "Take fewer, or a temperature above 0."
            )

    @property
    def reads(self) -> list[str]:
        return self.inputs

    @property
    def writes(self) -> Mapping[str, str]:
        return {self.column: "list<string>" if self.sampling.num > 1 else "string"}

    @property
    def _each(self) -> Sampling:
        """How each single answer is drawn."""
        heat = self.sampling.temperature
        if heat is None:
            heat = float(self.sampling.num > len(self.prompts))
        return self.sampling.model_copy(update={"num": 1, "temperature": heat})

    def provenance(self) -> Provenance:
        return Provenance(
            how="caption fuse", model=self.source.name(), prompt="\n---\n".join(self.prompts),
            sampling=self._each.noted() | {"num": self.sampling.num}, inputs=self.inputs,
            settings={"limit": self.limit} | self.source.noted(sees=False),
        )  # fmt: skip

    def load(self) -> AskWorker:
        generator = self.source.load(self._each, sees=False)
        return AskWorker(generator, self._asks, self.column, self.sampling.num > 1, self.limit)

    def _asks(self, row: Row) -> list[Ask] | str | Failed:
        demand_texts(row, self.inputs)
        texts = texts_of(row, self.inputs)
        if not texts:
            return Failed("no text")
        if len(texts) == 1 and len(placeholders(self.prompts)) > 1:
            return tidy(next(iter(texts.values())), self.limit)
        values = {name: texts.get(name, MISSING) for name in self.inputs} | {ALL: "; ".join(texts.values())}
        num, key = self.sampling.num, str(row["key"])
        first = int(record.fingerprint(key), 16) if num == 1 else 0
        chosen = [self.prompts[(first + i) % len(self.prompts)] for i in range(num)]
        return [Ask(f"{key}/{i}", _filled(prompt, values)) for i, prompt in enumerate(chosen)]
