"""Training methods, one file each. `build` finds a method by its file name; see `base` for the contract."""

import difflib
import importlib
import pkgutil
from typing import Any

from torch import nn

from cutline.errors import ConfigError
from cutline.objectives.base import Batch, Features, Objective, ObjectiveConfig, Texts, View

__all__ = ["Batch", "Features", "Objective", "ObjectiveConfig", "Texts", "View", "build", "config_of", "names"]


def names() -> list[str]:
    """The methods there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in {"base", "gather"})


def config_of(name: str, values: dict[str, Any]) -> ObjectiveConfig:
    """Validate the options of the objective `name`; raises `ConfigError` for a name that does not exist."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names()) + "."
        raise ConfigError(f"unknown objective {name!r}: {hint}")
    config: ObjectiveConfig = importlib.import_module(f"{__name__}.{name}").Config.model_validate(values)
    return config


def build(name: str, config: ObjectiveConfig, model: nn.Module) -> Objective:
    objective: Objective = importlib.import_module(f"{__name__}.{name}").Objective(config, model)
    return objective
