"""The commands `cutline zeroshot …`: a thin skin over `cutline.zeroshot`."""

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
