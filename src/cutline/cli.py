"""The command line: a thin skin over the Python API. Heavy libraries are imported inside the commands, when needed."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cutline import cli_captions, cli_zeroshot
from cutline.cli_output import done, folder_for, scored, show
from cutline.errors import ConfigError, CutlineError

app = typer.Typer(
    name="cutline", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From pictures with poor text to vision backbones that see.",
)  # fmt: skip
pairs_app = typer.Typer(no_args_is_help=True, help="Make, look at, check and export a table of pairs.")
transfer_app = typer.Typer(no_args_is_help=True, help="Move an encoder to a task and score it.")
app.add_typer(pairs_app, name="pairs")
app.add_typer(cli_captions.app, name="caption")
app.command("reinforce")(cli_captions.reinforce)
app.command("label")(cli_captions.label)
app.add_typer(transfer_app, name="transfer")
app.add_typer(cli_zeroshot.app, name="zeroshot")

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of the config, key=value.")]
Encoder = Annotated[str, typer.Option(help="A run directory, name:pretrained of open_clip, a timm name, or hf-hub:…")]
Out = Annotated[Path | None, typer.Option(help="Output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """From pictures with poor text to vision backbones that see."""


@app.command()
def quickstart(
    size: Annotated[str, typer.Option(help="tiny (2 minutes), small (10), or full (one GPU, half an hour).")] = "small",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("quickstart"),
    seeds: Annotated[int | None, typer.Option(help="Seeds to run (default: the size's own number).")] = None,
    overrides: Overrides = None,
) -> None:
    """The whole chain on embedded scenes: pretrain three ways, transfer, compare; ends with a table and a report."""
    from cutline.study.plan import quickstart_plan

    extra = [f"seeds={list(range(seeds))}"] if seeds is not None else []
    _study(quickstart_plan(size, extra + list(overrides or [])), out / size, None)


@app.command()
def study(
    plan: Annotated[Path, typer.Argument(help="A study, YAML.")],
    only: Annotated[str | None, typer.Option(help="Run only ARM or ARM/TASK.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the report of what is finished.")] = False,
    out: Out = None,
    overrides: Overrides = None,
) -> None:
    """Run arms × tasks × seeds, resumably, and report."""
    from cutline.study.plan import load_plan

    loaded = load_plan(plan, list(overrides or []))
    _study(loaded, out or Path("runs") / loaded.name, only, report)


def _study(plan: Any, out: Path, only: str | None, report_only: bool = False) -> None:
    from cutline.study.report import print_table, write_report
    from cutline.study.runner import check_folder, run

    if report_only:
        if not out.is_dir():
            raise ConfigError(f"there is no study in {out} yet; run it without --report, or name its --out.")
        check_folder(plan, out)
    else:
        run(plan, out, only, say=lambda line: print(line, file=sys.stderr, flush=True))
    print_table(plan, out)
    page = write_report(plan, out)
    trained = next((a for a, o in reversed(plan.arms.items()) if o is not None), None)
    done(page, f"open {page}")
    if trained is not None:
        from cutline.study.runner import Cell

        folder = Cell(trained, plan.seeds[0]).folder(out)
        print(f"The encoders are run directories, for example {folder}")


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="The table to write, OUT.lance.")],
    n: Annotated[int, typer.Option("--n", help="How many scenes.")],
    size: Annotated[int, typer.Option(help="Pixels a side, 48 to 448.")] = 224,
    seed: Annotated[int, typer.Option(help="Scene i of a seed is always the same.")] = 0,
    mix: Annotated[str, typer.Option(help="Quality of the alt text: web, mild or harsh.")] = "web",
    objects: Annotated[int, typer.Option(help="Kinds of objects in the world: 24, 32, … 96.")] = 96,
    labels: Annotated[
        Path | None, typer.Option(help="Also write pictures, masks and depth here (folder: layout).")
    ] = None,
) -> None:
    """Write embedded scenes as pairs, with captions and alt text."""
    from cutline.scenes import parse_spec
    from cutline.scenes.write import write_pairs

    write_pairs(parse_spec(f"scenes:n={n},size={size},seed={seed},mix={mix},objects={objects}"), out, labels)
    done(out, f"cutline pairs info {out}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Pretrain by a recipe. Under torchrun: on all its processes."""
    from cutline.config import load
    from cutline.train.loop import train as run
    from cutline.train.recipe import Recipe

    loaded = load(Recipe, recipe, list(overrides or []))
    folder = run(loaded, out or Path("runs") / loaded.name, resume)
    joint = {"contrastive", "sigmoid"} & loaded.objective_configs().keys()
    then = f"zeroshot retrieve --model {folder} --data {loaded.data.pairs}"
    done(folder, f"cutline {then if joint else f'transfer segment --encoder {folder} --data SPEC'}")


def _transfer(task: Any, measures: str) -> None:
    """Give `cutline transfer` the command of a task."""

    @transfer_app.command(task, help=measures)
    def command(
        encoder: Encoder,
        data: Annotated[str | None, typer.Option(help="What to train and score on: kind:path.")] = None,
        predict: Annotated[
            list[Path] | None,
            typer.Option(help="Instead of --data: a picture or a folder, for the transferred model in --encoder."),
        ] = None,
        overrides: Overrides = None,
        recipe: Annotated[Path | None, typer.Option(help="Options, YAML; recipes/transfer/ has the papers'.")] = None,
        out: Out = None,
        resume: Resume = False,
        sweep: Annotated[str | None, typer.Option(help="Choose by validation: lr, or lr=1e-4,3e-4,1e-3.")] = None,
    ) -> None:
        if (data is None) == (not predict):
            raise ConfigError(
                "give --data KIND:PATH to train and score on, or --predict PICTURE to use a transferred model, and not both."
            )
        if data is None:
            if recipe or resume or sweep:
                raise ConfigError("--predict trains nothing: leave --recipe, --resume and --sweep out.")
            return _predict(task, encoder, predict or [], overrides, out)
        from cutline.config import load
        from cutline.transfer.run import config_of, transfer
        from cutline.transfer.sweep import parse_rates
        from cutline.transfer.sweep import sweep as run_sweep

        tried = [] if sweep is None else [f"sweep {sweep}"]
        folder = out or folder_for(encoder, task, data, [*(overrides or []), *tried], recipe)
        config = load(config_of(task), recipe, list(overrides or []))
        if sweep is None:
            result = transfer(task, encoder, data, config, folder, resume)
        else:
            result = run_sweep(task, encoder, data, config, folder, parse_rates(sweep), resume)
        scored(result, folder, f"cutline transfer {task} --encoder {folder} --predict PICTURE")


_transfer("segment", "Semantic segmentation: mIoU, mAcc, pixel accuracy.")
_transfer("depth", "Depth from one picture: RMSE (m), AbsRel, δ1–3, log10, SILog.")
_transfer("classify", "The class of a picture (head=linear, attentive or knn): top-1, top-5, mean class accuracy.")
_transfer("detect", "Objects, their boxes and masks: AP, AP50, AP75, AP of small, medium and large ones.")


def _predict(task: str, run: str, pictures: list[Path], overrides: list[str] | None, out: Path | None) -> None:
    from cutline.transfer.predict import predict

    report = predict(run, pictures, out, list(overrides or []), task)
    print(f"Pictures predicted: {len(report.written):,}")
    done(report.folder)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="What --encoder takes, or the folder of a transferred model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="timm, open_clip, onnx or torch_export.")],
    size: Annotated[
        str | None, typer.Option(help="Pictures of onnx and torch_export: 224, or height x width as 480x640.")
    ] = None,
) -> None:
    """Write a model for other programs, and check that it gives the same values there."""
    from cutline.towers.programs import TOLERANCE, parse_size
    from cutline.transfer.export import export as run_export

    record = run_export(run, out, to, parse_size(size) if size else None)
    parts = {"the model": record, **record}
    for name, said in parts.items():
        if isinstance(said, dict) and "largest_difference" in said:
            share = said["largest_difference"]
            print(f"{name}: differs by {share:.1e} of its largest value (at most {TOLERANCE:g} is let through).")
    done(out)


@pairs_app.command("create")
def pairs_create(
    out: Annotated[Path, typer.Argument(help="The table to write, OUT.lance.")],
    sources: Annotated[
        list[str], typer.Argument(help="Tars (braces and globs), a folder, csv/tsv/jsonl/parquet, coco:…, hf:…")
    ],
    alt: Annotated[str | None, typer.Option(help="Field that holds the alt text.")] = None,
    captions: Annotated[str | None, typer.Option(help="Field that holds captions, for example json:captions.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="More columns, NAME=FIELD.")] = None,
    inline: Annotated[bool, typer.Option("--inline", help="Copy the pictures into the table.")] = False,
    image: Annotated[
        str | None, typer.Option(help="Column of a csv, tsv, jsonl or parquet with paths or bytes.")
    ] = None,
    keep_textless: Annotated[bool, typer.Option("--keep-textless", help="Keep pictures without any text.")] = False,
    prefix_keys: Annotated[bool, typer.Option("--prefix-keys", help="Put the file's name before each key.")] = False,
    max_bad: Annotated[
        float, typer.Option(help="Stop when more than this share of samples is skipped, or of a column's values lost.")
    ] = 0.1,
) -> None:
    """Index pictures where they lie, with their texts, as a table."""
    from cutline.pairs import create

    report = create(
        out,
        sources,
        alt=alt,
        captions=captions,
        image=image,
        fields=_named(field),
        inline=inline,
        need_text=not keep_textless,
        prefix_keys=prefix_keys,
        max_bad=max_bad,
    )
    show(report)
    done(out, f"cutline pairs check {out}")


@pairs_app.command("info")
def pairs_info(pairs: Annotated[Path, typer.Argument(help="A table of pairs.")]) -> None:
    """Rows, columns, where each column comes from, versions."""
    from cutline.pairs import Pairs

    show(Pairs.open(pairs, unfinished=True).info())


@pairs_app.command("check")
def pairs_check(pairs: Annotated[Path, typer.Argument(help="A table of pairs.")]) -> None:
    """Decode every picture and look at every text; report what is broken."""
    from cutline.pairs import Pairs, check

    show(check(Pairs.open(pairs)))


@pairs_app.command("export")
def pairs_export(
    pairs: Annotated[Path, typer.Argument(help="A table of pairs.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="webdataset or parquet.")] = "webdataset",
    where: Annotated[str | None, typer.Option(help="Only rows that match this filter.")] = None,
) -> None:
    """Write a table back as webdataset tars or parquet files."""
    from cutline.pairs import Pairs, export

    show(export(Pairs.open(pairs, where=where), out, format=format))
    done(out)


def _named(items: list[str] | None) -> dict[str, str]:
    for item in items or []:
        if "=" not in item:
            raise CutlineError(
                f"--field {item!r} is not of the form NAME=FIELD, for example --field licence=json:license."
            )
    return dict(item.split("=", 1) for item in items or [])


def main() -> None:
    """Entry point: errors for users are one line on stderr and exit code 1; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    try:
        app(standalone_mode=True)
    except CutlineError as e:
        if debug:
            raise
        print(f"cutline: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as e:  # a folder that cannot be written, a full disk
        if debug:
            raise
        print(f"cutline: {e}. Check the path and the room there; --debug shows where.", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
