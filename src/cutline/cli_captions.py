"""The commands `cutline caption …`, `cutline reinforce` and `cutline label`: a thin skin over `cutline.captions` and
`cutline.experts`."""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cutline.cli_output import done, show
from cutline.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Better captions: train a captioner, write, fuse, score, select, import.")

Table = Annotated[Path, typer.Argument(help="A table of pairs.")]
As = Annotated[str, typer.Option("--as", help="Name of the new column (of several: what their names begin with).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of the config, key=value.")]

# What every command has that goes over the rows of a table; see `captions.engine.RunConfig`.
RUN: dict[str, tuple[Any, Any]] = {
    "on": (Annotated[str, typer.Option(help="local, or ray: the cluster of RAY_ADDRESS, or one started here.")], "local"),
    "batch": (Annotated[int | None, typer.Option(help="Rows a step.")], None),
    "where": (Annotated[str | None, typer.Option(help="Only rows that pass this filter (SQL); others are null.")], None),
    "workers": (Annotated[int | None, typer.Option(help="On Ray: how many load the model.")], None),
    "gpus": (Annotated[float | None, typer.Option(help="On Ray: GPUs of each worker.")], None),
    "max_bad": (Annotated[float | None, typer.Option(help="Stop when more than this share of the rows fails (0.1).")], None),
    "accept_failed": (Annotated[bool, typer.Option("--accept-failed", help="Leave null what could be tried again.")], False),
    "restart": (Annotated[bool, typer.Option("--restart", help="Drop what an earlier start left.")], False),
    "estimate": (Annotated[bool, typer.Option("--estimate", help="A few batches, then tell what the rest costs.")], False),
}  # fmt: skip


def over_rows(batch: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `RUN`; it gets them as `run` (a `RunConfig`) and `where`. batch: its default."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*args: Any, **given: Any) -> None:
            from cutline.captions.engine import RunConfig
            from cutline.config import check

            options = {name: given.pop(name) for name in RUN}
            where, accept = options.pop("where"), options.pop("accept_failed")
            options["batch"] = batch if options["batch"] is None else options["batch"]
            options = {name: value for name, value in options.items() if value is not None}
            command(*args, run=check(RunConfig, options | {"accept": accept}), where=where, **given)

        own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("run", "where")]
        extra = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a) for n, (a, d) in RUN.items()
        ]
        wrapped.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
        return wrapped

    return wrap


@app.command()
def train(
    pairs: Table,
    source: Annotated[
        str, typer.Option("--from", help="Column with the good captions; rows without one are left out.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the captioner.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    on: Annotated[
        str, typer.Option(help="local, or ray: on a machine of the cluster, with a GPU if there is one.")
    ] = "local",
) -> None:
    """Train a captioner on the rows that have a good caption."""
    from cutline.captions.captioner import CaptionerConfig
    from cutline.config import load

    given = (str(pairs.resolve()), source, out.resolve(), load(CaptionerConfig, None, list(overrides or [])), resume)
    if on == "ray":
        from cutline.captions.cluster import call_on_ray

        result = call_on_ray(_train, *given)
    elif on == "local":
        result = _train(*given)
    else:
        raise ConfigError(f"--on {on!r} is neither local nor ray.")
    _scores(result)
    done(out, f"cutline caption write {pairs} --with {out} --as caption_ours")


def _train(pairs: str, source: str, out: Path, config: Any, resume: bool) -> Any:
    from cutline.captions.captioner import train_captioner
    from cutline.pairs import Pairs

    return train_captioner(Pairs.open(pairs), source, out, config, resume)


def _scores(result: Any) -> None:
    from rich.table import Table

    table = Table("held-out captions", "value")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:,.4g}")
    show(table)


@app.command()
@over_rows(batch=32)
def write(
    pairs: Table,
    model: Annotated[
        str, typer.Option("--with", help="A captioner folder, open_clip's coca_…:TAG, hf:MODEL, openai:URL#MODEL")
    ],
    column: As,
    num: Annotated[int, typer.Option(help="Captions for each picture; more than one makes a column of lists.")] = 1,
    prompt: Annotated[Path | None, typer.Option(help="A file with what hf: and openai: models are asked.")] = None,
    overrides: Overrides = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Write captions with a model: one column, null where there is none."""
    from cutline.captions.writers import writer

    _run(pairs, writer(model, column, num, prompt, list(overrides or [])), column, run, where)


@app.command()
@over_rows(batch=64)
def fuse(
    pairs: Table,
    inputs: Annotated[str, typer.Option(help="Columns to fuse, such as alt,caption_ours.")],
    model: Annotated[str, typer.Option("--with", help="rules, hf:MODEL or openai:URL#MODEL")],
    column: As,
    prompt: Annotated[str | None, typer.Option(help="veclip (the default), capsfusion, laclip, or a file.")] = None,
    num: Annotated[int, typer.Option(help="Texts for each picture; more than one makes a column of lists.")] = 1,
    overrides: Overrides = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Fuse alt text and captions into one text."""
    from cutline.captions.writers import fuser

    _run(pairs, fuser(model, _split(inputs), column, prompt, num, list(overrides or [])), column, run, where)


@app.command()
@over_rows(batch=64)
def score(
    pairs: Table,
    column: Annotated[str, typer.Option(help="The captions to score.")],
    prefix: As,
    model: Annotated[
        str | None, typer.Option("--with", help="A CLIP: a run, name:pretrained of open_clip, hf-hub:…")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only these scores, such as clip,tokens,repetition.")] = None,
    reference: Annotated[str | None, typer.Option(help="Column of good captions, for RefCLIPScore.")] = None,
    truth: Annotated[bool, typer.Option("--truth", help="Also judge by the scenes, on a table of scenes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the summary and its plot.")] = None,
    overrides: Overrides = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Score captions: a column for each score, and a summary of the set with a plot."""
    from cutline.captions.score.plan import ScoreConfig
    from cutline.captions.score.plan import score as make
    from cutline.captions.score.summary import summarise
    from cutline.config import apply, check
    from cutline.pairs import Pairs

    values = {"column": column, "model": model, "only": _split(only) if only else None, "reference": reference,
              "truth": truth}  # fmt: skip
    config = check(ScoreConfig, apply(values, overrides or [], ScoreConfig), given=overrides or [])
    table, reports = make(Pairs.open(pairs, where), config, prefix, run, say=_say)
    for report in reports:
        show(report)
    if run.estimate and reports:
        return
    out = out or pairs.with_name(f"{pairs.stem}-{prefix}")
    show(summarise(table, column, prefix, out))
    rule = f"top-fraction --by {prefix}_clip --fraction 0.3" if model else f"where --where '{prefix}_repetition < 0.2'"
    done(out, f"cutline caption select {pairs} --columns {column} --rule {rule} --as caption_train")


@app.command()
@over_rows(batch=1024)
def select(
    pairs: Table,
    rule: Annotated[str, typer.Option(help="where, top-fraction, best-of, or alip (weights instead of a choice).")],
    columns: Annotated[str, typer.Option(help="Columns of captions, such as alt,caption_ours.")],
    name: As,
    by: Annotated[
        str | None, typer.Option(help="Their scores: one for top-fraction, one each for best-of, three for alip.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="For top-fraction: the share of the captions to keep.")] = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Choose captions by a rule: one more column. With the rule where, --where is the rule."""
    from cutline.captions import engine
    from cutline.captions.select import SelectConfig
    from cutline.captions.select import select as choose
    from cutline.config import check
    from cutline.pairs import Pairs

    own = where if rule == "where" else None
    values = {
        "rule": rule,
        "columns": _split(columns),
        "by": _split(by or ""),
        "fraction": fraction,
        "where": own,
    }
    rows, work = choose(Pairs.open(pairs, None if own else where), check(SelectConfig, values), name)
    table, report = engine.run(rows, work, name, run, say=_say)
    if _report(table, report, run) and rule != "alip":
        print(
            f"{name}: chosen in {table.dataset.count_rows(f'{name} IS NOT NULL'):,} of {len(Pairs.open(pairs)):,} rows"
        )


@app.command("import")
def import_(
    pairs: Table,
    files: Annotated[
        list[str], typer.Argument(help="Files with captions: parquet, jsonl, json, csv, tsv (braces and globs).")
    ],
    column: As,
    field: Annotated[str, typer.Option(help="The field of the files with the caption, such as re_caption.")],
    by: Annotated[str, typer.Option(help="Column of the table to join by: key, uid, url, …")] = "key",
    id_field: Annotated[
        str | None, typer.Option(help="What that is called in the files, if it is called otherwise.")
    ] = None,
) -> None:
    """Take captions from files (Recap-DataComp, VeCap, your own), joined by key, uid or URL."""
    from cutline.captions.imports import import_captions
    from cutline.pairs import Pairs

    show(import_captions(Pairs.open(pairs), files, by, field, column, id_field))
    _sample(Pairs.open(pairs), column)
    done(pairs, f"cutline caption score {pairs} --column {column} --as score")


@over_rows(batch=32)
def reinforce(
    pairs: Table,
    name: As = "dr",
    teachers: Annotated[
        str | None, typer.Option(help="CLIPs whose embeddings are stored, such as ViT-L-14:openai,runs/mine")
    ] = None,
    texts: Annotated[str | None, typer.Option(help="Caption columns to embed (alt).")] = None,
    augmentations: Annotated[int | None, typer.Option(help="Stored augmentations of each picture (10).")] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option("--import", help="Take all from tars in DataCompDR's layout instead (may be repeated)."),
    ] = None,
    overrides: Overrides = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Store augmentations and teacher embeddings for reinforced training (DataCompDR), or import published ones."""
    from cutline.captions import engine
    from cutline.captions.datacompdr import ImportConfig, import_work, parse_teachers
    from cutline.captions.reinforce import ReinforceConfig, reinforce_work
    from cutline.config import apply, check
    from cutline.pairs import Pairs

    table, given = Pairs.open(pairs, where), overrides or []
    values: dict[str, Any]
    work: Any
    if shards:
        if texts is not None or augmentations is not None:
            raise ConfigError(
                "--texts and --augmentations say what to embed; with --import all is as it was published."
            )
        values = {"shards": shards} | (
            {"teachers": [t.model_dump() for t in parse_teachers(teachers)]} if teachers else {}
        )
        work = import_work(table, check(ImportConfig, apply(values, given, ImportConfig), given=given), name)
        show(work.shards)
        if "max_bad" not in run.model_fields_set:
            run = run.model_copy(update={"max_bad": 1.0})  # rows that are not in the shards have no value
    elif teachers:
        values = {"teachers": _split(teachers), "texts": _split(texts or "alt"), "augmentations": augmentations or 10}
        work = reinforce_work(table, check(ReinforceConfig, apply(values, given, ReinforceConfig), given=given), name)
    else:
        raise ConfigError("give --teachers A,B to embed with, or --import 'SHARDS/*.tar' to take what is published.")
    table, report = engine.run(table, work, name, run, say=_say)
    if _report(table, report, run, sample=False):
        done(pairs, f"cutline train RECIPE.yaml data.pairs={pairs} data.replay={name}")


@over_rows(batch=16)
def label(
    pairs: Table,
    expert: Annotated[str, typer.Option(help="segment, depth, or normals (computed from depth).")],
    model: Annotated[
        str,
        typer.Option("--with", help="hf:FOLDER or hf:ID of transformers, or a run of `cutline transfer segment|depth`"),
    ],
    column: As,
    overrides: Overrides = None,
    *,
    run: Any,
    where: str | None,
) -> None:
    """Pseudo-labels of an expert as a column of small maps, for the objective experts (CLIPTeX)."""
    from cutline.captions import engine
    from cutline.experts.label import label_work, summary
    from cutline.pairs import Pairs

    work = label_work(expert, model, column, list(overrides or []))
    table, report = engine.run(Pairs.open(pairs, where), work, column, run, say=_say)
    if _report(table, report, run, sample=False):
        lines, option = summary(table, column)
        print("\n".join(lines))
        done(pairs, f"cutline train RECIPE.yaml data.pairs={pairs} {option}")


def _run(pairs: Path, work: Any, name: str, run: Any, where: str | None) -> None:
    from cutline.captions import engine
    from cutline.pairs import Pairs

    table, report = engine.run(Pairs.open(pairs, where), work, name, run, say=_say)
    _report(table, report, run)


def _report(table: Any, report: Any, run: Any, sample: bool = True) -> bool:
    """What was done; whether the columns are there now. sample: with some texts, and what to do next."""
    show(report)
    if run.estimate and not set(report.columns) <= set(table.columns):
        print("What was made is kept: the same command without --estimate goes on from it.")
        return False
    if sample:
        for column in report.columns:
            _sample(table, column)
        done(Path(table.path), f"cutline pairs info {table.path}")
    return True


def _sample(table: Any, column: str, count: int = 3) -> None:
    """A few of the texts that were made."""
    import pyarrow as pa

    from cutline.captions.work import is_list, texts_in

    kind = table.schema.field(column).type
    if not len(table) or not pa.types.is_string(kind.value_type if is_list(kind) else kind):
        return
    rows = table.read(range(min(64, len(table))), ["key", column])
    for row in [r for r in rows if texts_in(r[column])][:count]:
        print(f"  {row['key']}  {' | '.join(texts_in(row[column]))}")


def _split(names: str) -> list[str]:
    return [name for part in names.split(",") if (name := part.strip())]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
