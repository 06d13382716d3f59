"""`cutline caption score`: which works make the scores that are asked for, and running them one after the other."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from cutline.captions.engine import RunConfig, run
from cutline.captions.report import WorkReport
from cutline.captions.score import text, truth
from cutline.captions.score.base import Asked, holds_lists
from cutline.captions.work import Work
from cutline.config import Config
from cutline.errors import ConfigError
from cutline.pairs import Pairs
from cutline.pairs.columns import exists, having_read
from cutline.record import hash_files

CLIP = ("clip", "refclip", "cosine", "alt_cosine")
SCORES = (*text.KINDS, *CLIP, *truth.KINDS)
MANY_ROWS = 1024  # a step of what needs no model


class ScoreConfig(Config):
    """What to score, and with what.

    column: the captions. model: a CLIP (see `towers.load`) for the scores that need one, and whose tokeniser and context
    count. only: names of scores; None takes all that can be made of what is given, but `cosine`, which says the same as
    CLIPScore. truth: also the scores against the scene. reference: column of references, for refclip. alt: column that
    alt_cosine compares with. prompt: put before the texts in clip and refclip. device: "auto" is a GPU if there is one.
    """

    column: str
    model: str | None = None
    only: list[str] | None = Field(None, min_length=1)
    truth: bool = False
    reference: str | None = None
    alt: str = "alt"
    prompt: str = "A photo depicts "
    device: str = "auto"

    @field_validator("only")
    @classmethod
    def _known(cls, only: list[str] | None) -> list[str] | None:
        for name in only or []:
            if name not in SCORES:
                near = difflib.get_close_matches(name, SCORES, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SCORES)}"
                raise ValueError(f"no score is called {name!r}; {hint}")
        return only


class Part(NamedTuple):
    """One work of several. name: what kind of score it makes: text, truth or clip."""

    name: str
    work: Work


def names(pairs: Pairs, config: ScoreConfig) -> list[str]:
    """The scores that `config` asks for of this table, in the order of `SCORES`. Raises `ConfigError`, `DataError`."""
    wanted = set(config.only or text.KINDS)
    wanted |= set(truth.KINDS) if config.truth else set()
    if config.only is None and config.model:
        wanted |= {"clip"} | ({"refclip"} if config.reference else set())
        wanted |= {"alt_cosine"} if config.alt in pairs.columns and config.alt != config.column else set()
    clip = [n for n in CLIP if n in wanted]
    if (clip or config.reference) and not config.model:
        raise ConfigError(f"{clip[0] if clip else 'refclip'} needs a CLIP to score with: name one, --with MODEL.")
    if "refclip" in wanted and not config.reference:
        raise ConfigError("refclip compares captions with references: name their column, --reference COLUMN.")
    if config.reference and "refclip" not in wanted:
        raise ConfigError(
            f"a reference ({config.reference!r}) is for refclip, which is not asked for: add it to --only."
        )
    compared = {"refclip": config.reference, "alt_cosine": config.alt}
    for name in wanted & compared.keys():
        if compared[name] == config.column:
            raise ConfigError(f"{name} would compare {config.column!r} with itself: name another column.")
        holds_lists(pairs, compared[name] or "")  # raises for a column that is no text
    return [n for n in SCORES if n in wanted]


def works(pairs: Pairs, config: ScoreConfig, prefix: str) -> list[Part]:
    """The works that make the scores as columns PREFIX_SCORE, those first that are quickly done."""
    found = names(pairs, config)
    many = holds_lists(pairs, config.column)

    def asked(kinds: Iterable[str]) -> Asked:
        return Asked(config.column, prefix, tuple(n for n in kinds if n in found), many, pairs.filter)

    revision = _revision(config.model) if config.model else ""
    parts = []
    if asked(text.KINDS).names:
        parts.append(Part("text", text.TextScores(asked(text.KINDS), config.model, revision)))
    if asked(truth.KINDS).names:
        parts.append(Part("truth", truth.TruthScores(asked(truth.KINDS), truth.world_of(pairs))))
    if asked(CLIP).names:
        from cutline.captions.score.clip import ClipScores

        assert config.model is not None
        more = (config.reference, config.alt, config.prompt, config.device)
        parts.append(Part("clip", ClipScores(asked(CLIP), config.model, revision, *more)))
    return parts


def score(
    pairs: Pairs, config: ScoreConfig, prefix: str, running: RunConfig, show: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[Pairs, list[WorkReport]]:  # fmt: skip
    """Score a column and add the scores; returns the table with them and a report of each work that was run.

    Scores that are there already from the same work are kept, so a second start goes on where a first was killed.
    Raises `ConfigError` for what does not fit together and `DataError` for columns that exist, and as `engine.run`.
    """
    parts = [p for p in works(pairs, config, prefix) if not _is_there(pairs, p.work)]
    reports = []
    for name, work in parts:
        step = running if name == "clip" else running.model_copy(update={"batch": max(running.batch, MANY_ROWS)})
        pairs, report = run(pairs, work, f"{prefix}_{name}", step, show, say)
        reports.append(report)
    return pairs, reports


def _is_there(pairs: Pairs, work: Work) -> bool:
    """Whether the columns of a work are there, made by the same work; raises `DataError` if they are another's."""
    newest = Pairs.open(pairs.path)
    taken = [column for column in work.writes if column in newest.columns]
    for column in taken:
        for source in work.reads:
            newest.check_fresh(column, source)
        made = newest.provenance(column)
        if made is None or not made.same_work(having_read(newest, work.provenance(), ["key", *work.reads])):
            raise exists(pairs.path, column)
    return bool(taken)


def _revision(model: str) -> str:
    """Fingerprint of a model's files, where they are here; the names of released weights say themselves what they are."""
    from cutline.towers.store import model_folder

    folder = model_folder(model)
    return hash_files(sorted(p for p in Path(folder).iterdir() if p.is_file())) if folder else ""
