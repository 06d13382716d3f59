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
        done(draw_picture(model, picture, config, folder))
        return
    then = f"cutline zeroshot segment --model {model} --picture FILE --classes 'a red apple; grass; sky'"
    scored(run(model, str(data), config, folder), folder, then)
