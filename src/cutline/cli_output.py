"""What commands share: the folder of a score, and what they print; under torchrun the first process alone does."""

import os
from pathlib import Path
from typing import Any


def folder_for(model: str, task: str, data: str, overrides: list[str] | None, recipe: Path | None = None) -> Path:
    """Beside the run's own files, or under `runs/` for a model from elsewhere; one for each choice of options."""
    from cutline.record import fingerprint, slug

    base = Path(model) if Path(model).is_dir() else Path("runs") / slug(model)
    options = f"-{recipe.stem}" if recipe else ""
    options += f"-{fingerprint(sorted(overrides))[:6]}" if overrides else ""
    return base / f"{task}-{slug(data)[-60:].lstrip('-')}{options}"


def first() -> bool:
    """Whether this is the first process of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show(thing: Any) -> None:
    """Print a table or another thing that rich can draw."""
    from rich.console import Console

    if first():
        Console().print(thing)


def scored(result: Any, folder: Path, then: str = "") -> None:
    """Print the metrics of a `Result`, where it was written and what to run next."""
    from rich.table import Table

    table = Table(
        "metric", "value", title=f"{result.protocol.task} on {result.protocol.data} ({result.protocol.split})"
    )
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:,.4g}")
    show(table)
    done(folder, then)


def done(path: Path, then: str = "") -> None:
    """Print where the outputs are, and the command to run next."""
    if not first():
        return
    print(f"Written: {path}")
    if then:
        print(f"Next: {then}")
