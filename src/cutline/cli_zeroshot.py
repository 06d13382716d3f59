"""The commands `cutline zeroshot …`: a thin skin over `cutline.zeroshot`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cutline.cli_output import folder_for, scored

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
    from cutline.train.stream import open_source
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
    scored(run(model, open_source(data, config.where), config, data, folder), folder)


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
    if os.environ.get("RANK", "0") == "0":
        scored(result, folder, f"cutline transfer classify --encoder {folder} --predict PICTURE")
