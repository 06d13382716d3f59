"""The commands `cutline zeroshot …`: a thin skin over `cutline.zeroshot`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cutline.cli_output import done, first, folder_for, scored

app = typer.Typer(no_args_is_help=True, help="What an image–text model knows without labels.")

Model = Annotated[str, typer.Option(help="A run directory, name:pretrained of open_clip, or hf-hub:…")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of the config, key=value.")]
Out = Annotated[Path | None, typer.Option(help="Output folder.")]


@app.command()
def retrieve(
    model: Model,
    data: Annotated[str, typer.Option(help="A table of pairs, or scenes:…")],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Find the picture of a text and the text of a picture: recall at 1, 5, 10 both ways."""
    from cutline.config import load
    from cutline.zeroshot.retrieve import RetrieveConfig, held_out
    from cutline.zeroshot.retrieve import retrieve as run

    config = load(RetrieveConfig, None, list(overrides or []))
    if config.where is None:
        seen, config.where = held_out(model, data)
        if config.where and first():
            print(f"Scoring only pairs that the model was not trained on: where {config.where}", file=sys.stderr)
        elif seen and first():
            print(
                "The model was trained on these very pairs: the scores say how well it learnt them, no more.",
                file=sys.stderr,
            )
    folder = out or folder_for(model, "retrieve", data, overrides)
    scored(run(model, data, config, out=folder), folder)


@app.command()
def classify(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Pictures with a class each: kind:path.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Instead of --data: one picture, with --classes.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="'a red apple; grass, lawn; sky', or a file of one a line.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """The class of a picture by the names of the classes alone: top-1, top-5, mean class accuracy."""
    from cutline.config import load
    from cutline.errors import ConfigError
    from cutline.zeroshot.classify import ClassifyConfig, name_picture
    from cutline.zeroshot.classify import classify as run

    config = load(ClassifyConfig, None, list(overrides or []))
    if (data is None) == (picture is None) or (picture is None) != (classes is None):
        raise ConfigError(
            "give --data KIND:PATH to score, or --picture PICTURE with --classes 'a; b; c', and not both."
        )
    if data is not None:
        folder = out or folder_for(model, "zeroshot-classify", data, overrides)
        return scored(run(model, data, config, folder), folder)
    assert picture is not None
    assert classes is not None
    given = config.model_fields_set - {"prompts", "device"}
    if given:
        raise ConfigError(f"{', '.join(sorted(given))} is of --data: one picture takes prompts= and device= alone.")
    folder = out or folder_for(model, "zeroshot-classify", str(picture), [*(overrides or []), f"names={classes}"])
    for name, share in list(name_picture(model, picture, classes, config, folder).items())[:5]:
        print(f"{share:6.1%}  {name}")
    done(folder / f"{picture.stem}.png")


@app.command()
def suite(
    plan: Annotated[Path, typer.Argument(help="A suite, YAML; recipes/suites/ has some.")],
    model: Annotated[
        list[str], typer.Option(help="A run directory, name:pretrained, or hf-hub:…; as often as you like.")
    ],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Many data sets, one table with averages; what is scored is not scored again."""
    from cutline.cli_output import show
    from cutline.errors import CutlineError
    from cutline.zeroshot.suite import load_suite, run
    from cutline.zeroshot.table import table, write_table

    loaded = load_suite(plan, list(overrides or []))
    folder = out or Path("runs") / f"suite-{loaded.name}"
    failed = run(loaded, model, folder, say=lambda line: print(line, file=sys.stderr, flush=True))
    if not first():
        return
    made = table(loaded, model, folder)
    write_table(made, folder, failed)
    from rich.table import Table

    shown = Table(*made.header(), title=loaded.name)
    for line in made.lines():
        shown.add_row(*line)
    show(shown)
    done(folder / "table.md")
    if failed:
        names = ", ".join(sorted({name for _, name in failed}))
        raise CutlineError(f"{len(failed)} scores failed ({names}): put the data right and run the same again.")


@app.command()
def segment(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Class maps to score on: voc:PATH, scenes:…, folder:PATH, …")] = None,
    overrides: Overrides = None,
    classes: Annotated[
        str | None, typer.Option(help="Names, 'a red apple; grass, lawn; sky', or a file of them.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="In place of data: one picture whose map is drawn.")] = None,
    out: Out = None,
) -> None:
    """Say of every pixel which word it is, without training: mIoU on data, or the map of a picture."""
    from cutline.config import load
    from cutline.errors import ConfigError
    from cutline.zeroshot.segment import SegmentConfig, draw_picture
    from cutline.zeroshot.segment import segment as run

    if (data is None) == (picture is None) or (picture is not None and classes is None):
        raise ConfigError("give --data SPEC to score on, or --picture FILE with --classes 'a red apple; grass; sky'.")
    config = load(SegmentConfig, None, [*(overrides or [])])
    config = config if classes is None else config.model_copy(update={"names": classes})
    options = [*(overrides or []), *([f"names={classes}"] if classes else [])]
    folder = out or folder_for(model, "zeroshot-segment", data or str(picture), options)
    if picture is not None:
        if idle := {"split", "pictures"} & config.model_fields_set:
            raise ConfigError(f"{', '.join(sorted(idle))} is of --data: leave it out.")
        return done(draw_picture(model, picture, config, folder))
    then = f"cutline zeroshot segment --model {model} --picture FILE --classes 'a red apple; grass; sky'"
    scored(run(model, str(data), config, folder), folder, then)


@app.command()
def depth(
    model: Annotated[
        str,
        typer.Option(
            help="A run directory or name:pretrained of open_clip; with --picture also a model of this command."
        ),
    ],
    data: Annotated[str | None, typer.Option(help="What to score on, and to train on: kind:path.")] = None,
    picture: Annotated[list[Path] | None, typer.Option(help="Instead of --data: a picture or a folder.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Depth from words (method=depthclip, tokens or mirror): RMSE (m), AbsRel, δ1–3, log10, SILog."""
    from cutline.errors import ConfigError
    from cutline.zeroshot.depth import config_for, predict
    from cutline.zeroshot.depth import depth as run

    given = list(overrides or [])
    if (data is None) == (not picture):
        raise ConfigError("give --data KIND:PATH to score, or --picture PICTURE to look at one, and not both.")
    if data is None:
        if resume:
            raise ConfigError("--picture trains nothing: leave --resume out.")
        report = predict(model, picture or [], given, out or folder_for(model, "zeroshot-depth", "pictures", overrides))
        print(f"Pictures predicted: {len(report.written):,}")
        return done(report.folder)
    config = config_for(given)
    folder = out or folder_for(model, "zeroshot-depth", data, overrides)
    result = run(model, data, config, folder, resume)
    named = model if config.method == "depthclip" else folder
    scored(result, folder, f"cutline zeroshot depth --model {named} --picture PICTURE")


@app.command()
def adapt(
    model: Model,
    data: Annotated[str, typer.Option(help="Pictures and the names of their classes: kind:path.")],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="Options, YAML; recipes/adapt/ has the paper's.")] = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Adapt to a set of classes by pictures without labels (MUST): top-1, top-5, mean class accuracy, before and after."""
    from cutline.config import load
    from cutline.zeroshot.adapt import adapt as run
    from cutline.zeroshot.must import AdaptConfig

    config = load(AdaptConfig, recipe, list(overrides or []))
    folder = out or folder_for(model, "adapt", data, overrides, recipe)
    result = run(model, data, config, folder, resume)
    scored(result, folder, f"cutline transfer classify --encoder {folder} --predict PICTURE")


@app.command()
def proposals(
    model: Model,
    data: Annotated[str, typer.Option(help="kind:path, as for transfer segment.")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train a MaskFormer on the seen classes; it and the model segment seen and unseen ones (ZSSeg).

    With a model that this command has trained, score it on other data, all of whose classes count as unseen.
    """
    from cutline.config import load
    from cutline.errors import ConfigError
    from cutline.zeroshot.proposals import ProposalsConfig, across, is_trained
    from cutline.zeroshot.proposals import proposals as run

    folder = out or folder_for(model, "proposals", data, overrides)
    if is_trained(model):
        if resume:
            raise ConfigError("scoring trained proposals on other data cannot be resumed: leave --resume out.")
        scored(across(model, data, list(overrides or []), folder), folder)
        return
    config = load(ProposalsConfig, None, list(overrides or []))
    result = run(model, data, config, folder, resume)
    scored(result, folder, f"cutline zeroshot proposals --model {folder} --data SPEC   (other data)")
