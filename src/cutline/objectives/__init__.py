"""Training methods, one file each. `build` finds a method by its file name; see `base` for the contract."""

import importlib
import pkgutil

from torch import nn

from cutline.objectives.base import Batch, Features, Objective, ObjectiveConfig, Texts, View

__all__ = ["Batch", "Features", "Objective", "ObjectiveConfig", "Texts", "View", "build", "config_class", "names"]

HELPERS = {"base", "chunked", "collapse", "gather", "teacher"}  # files that are no methods


def names() -> list[str]:
    """The methods there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in HELPERS)


def config_class(name: str) -> type[ObjectiveConfig]:
    config: type[ObjectiveConfig] = importlib.import_module(f"{__name__}.{name}").Config
    return config


def build(name: str, config: ObjectiveConfig, model: nn.Module) -> Objective:
    objective: Objective = importlib.import_module(f"{__name__}.{name}").Objective(config, model)
    return objective
