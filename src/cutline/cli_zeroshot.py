"""The commands `cutline zeroshot …`: a thin skin over `cutline.zeroshot`."""

import os
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
def depth(
    model: Annotated[
        str, typer.Option(help="A run directory, name:pretrained of open_clip, or a model of this command.")
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
        report = predict(model, picture or [], given, out or folder_for(model, "zeroshot-depth", "pictures", overrides))
        print(f"Pictures predicted: {len(report.written):,}")
        return done(report.folder)
    config = config_for(given)
    folder = out or folder_for(model, "zeroshot-depth", data, overrides)
    result = run(model, data, config, folder, resume)
    if os.environ.get("RANK", "0") == "0":
        named = model if config.method == "depthclip" else folder
        scored(result, folder, f"cutline zeroshot depth --model {named} --picture PICTURE")
