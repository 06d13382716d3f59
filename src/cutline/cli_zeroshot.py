"""The commands `cutline zeroshot …`: a thin skin over `cutline.zeroshot`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cutline.cli_output import done, folder_for, scored

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
        if config.where:
            print(f"Scoring only pairs that the model was not trained on: where {config.where}", file=sys.stderr)
        elif seen:
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
    folder = out or folder_for(model, "zeroshot-classify", str(picture), overrides)
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
