"""Which work a `--with` means: of `caption write` and `caption fuse`. A new kind of writer is added here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from cutline.captions.coca import CocaWriter
from cutline.captions.fuse import FuseWork, read_prompts
from cutline.captions.generator import text_of
from cutline.captions.rules import RulesFuse
from cutline.captions.vlm import HF, OPENAI, VlmWriter, source_of
from cutline.captions.work import Work
from cutline.config import Config, apply, check
from cutline.errors import ConfigError

TAKEN = ("column", "model", "inputs", "source.kind", "source.model", "source.url")  # what other options say
C = TypeVar("C", bound=Config)


def writer(
    model: str, column: str, num: int = 1, prompt: Path | None = None, overrides: list[str] | None = None
) -> Work:
    """The work that writes `num` captions of each picture with `model`; overrides of its config, dotted.

    model: "hf:FOLDER or ID" or "openai:URL#MODEL" (`VlmWriter`), else a CoCa: a captioner's folder, or any name that
    `towers.load` knows (`CocaWriter`). Raises `ConfigError` for options that the writer does not have.
    """
    if model.startswith((HF, OPENAI)):
        values = {"source": source_of(model).model_dump(), "column": column, "sampling": {"num": num}}
        return _built(VlmWriter, values | ({"prompt": text_of(prompt)} if prompt else {}), overrides)
    if prompt is not None:
        raise ConfigError(f"--prompt is for hf: and openai: models; the CoCa {model!r} only looks at the picture.")
    return _built(CocaWriter, {"model": model, "column": column, "num": num}, overrides)


def fuser(
    model: str,
    inputs: list[str],
    column: str,
    prompt: str | None = None,
    num: int = 1,
    overrides: list[str] | None = None,
) -> Work:
    """The work that fuses the columns `inputs` with "rules", "hf:…" or "openai:…" (and the prompt "veclip")."""
    if model == "rules":
        if prompt is not None:
            raise ConfigError(f"--prompt {prompt!r} is for a language model; --with rules asks none.")
        if num != 1:
            raise ConfigError(f"--with rules gives one text for each picture, and --num is {num}.")
        return _built(RulesFuse, {"inputs": inputs, "column": column}, overrides)
    values = {"source": source_of(model).model_dump(), "column": column, "inputs": inputs, "sampling": {"num": num},
              "prompts": read_prompts(prompt or "veclip", inputs)}  # fmt: skip
    return _built(FuseWork, values, overrides)


def _built(kind: type[C], values: Mapping[str, Any], overrides: list[str] | None) -> C:
    given = overrides or []
    taken = [o for o in given if o.partition("=")[0] in TAKEN]
    if taken:
        raise ConfigError(
            f"the override {taken[0]!r} would change what --as, --with or --inputs say: change these instead."
        )
    return check(kind, apply(dict(values), given, kind), given=given)
