"""Recipes: YAML + dotted overrides, checked by pydantic models that live beside the components they configure.

`load(Model, path, ["a.b=1"])` reads the file, applies the overrides (OmegaConf's dot-list syntax, so values are YAML)
and validates. An unknown or ill-typed key becomes a `ConfigError` naming the key, the recipe line (or the override)
and the nearest valid key.
"""

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cutline.errors import ConfigError


class Config(BaseModel):
    """Base of every config model: unknown keys are errors, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)
Location = tuple[str | int, ...]


def load(
    model: type[C], path: str | Path | None, overrides: Sequence[str] = (), shape: type[BaseModel] | None = None
) -> C:
    """Read `path` (YAML; None for all defaults), apply `overrides` (`key.sub=value`) and validate as `model`.

    shape: the model whose sections the overrides follow, where `model` leaves one open.
    """
    text = ""
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"cannot read the recipe {str(path)!r}: {e.strerror}. Check the path.") from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"{str(path)!r} is no recipe: it is not UTF-8 text. Check the path.") from e
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, and holds a {type(values).__name__}.")
    return check(model, apply(values, overrides, shape or model), node, path, overrides)


def check(
    model: type[C], values: dict[str, Any], node: yaml.Node | None = None, path: Any = None, given: Sequence[str] = ()
) -> C:
    """`values` validated as `model`; raises `ConfigError` naming what is wrong, and its line if `node` is the YAML."""
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise ConfigError(_explain(e, model, node, path, given)) from e


def dump(config: Config) -> str:
    """The config as YAML, complete and in the order of its fields; `load` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply(values: dict[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """`values` with the dotted overrides merged in.

    Sections merge and everything else replaces, as in OmegaConf; but a mapping whose keys are free in `model` (columns
    and their weights) is a value, so `data.text.columns={caption: 1}` leaves no other column.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} is not of the form key=value, for example train.batch=256.")
    try:
        merged: Any = OmegaConf.create(values)
        for item in overrides:
            given = OmegaConf.from_dotlist([item])
            for key in _replaced(model, item.split("=", 1)[0], given):
                if OmegaConf.select(merged, key) is not None:
                    OmegaConf.update(merged, key, None)
            merged = OmegaConf.merge(merged, given)
        result = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as e:
        raise ConfigError(f"cannot apply the overrides {list(overrides)}: {e}") from e
    assert isinstance(result, dict)
    return {str(k): v for k, v in result.items()}


def _explain(
    error: ValidationError, model: type[BaseModel], node: yaml.Node | None, path: Any, overrides: Sequence[str]
) -> str:
    lines = []
    for problem in error.errors():
        loc = problem["loc"]
        key = ".".join(str(p) for p in loc)
        where = _origin(loc, node, path, overrides)
        if problem["type"] == "extra_forbidden":
            valid = sorted(_fields(model, loc[:-1]))
            near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "valid keys: " + ", ".join(valid) + "."
            lines.append(f"unknown key {key!r}{where}: {hint}")
        else:
            value = problem.get("input")
            shown = "" if problem["type"] == "missing" or isinstance(value, dict) else f" (got {value!r})"
            lines.append(f"{key or 'recipe'}{where}: {problem['msg'].removeprefix('Value error, ')}{shown}")
    return "\n".join(lines)


def _origin(loc: Location, node: yaml.Node | None, path: Any, overrides: Sequence[str]) -> str:
    key = ".".join(str(p) for p in loc)
    for item in overrides:
        name = item.split("=", 1)[0]
        if name == key or key.startswith(name + "."):
            return f" (override {item!r})"
    line = None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return f" ({path}, line {line})" if line and path else ""


def _fields(model: type[BaseModel], loc: Location) -> set[str]:
    """Names of the fields of the (nested) model at `loc`."""
    models: set[type[BaseModel]] = {model}
    for part in loc:
        found: set[type[BaseModel]] = set()
        for m in models:
            field = m.model_fields.get(str(part))
            if field is not None:
                found |= _models_in(field.annotation)
        models = found or models
    return {name for m in models for name in m.model_fields}


def _replaced(model: type[BaseModel], key: str, given: Any) -> list[str]:
    """The keys of the mappings that the override of `key` replaces: itself, or those in the section that it is."""
    from omegaconf import DictConfig, OmegaConf

    if _is_free(model, key.split(".")):
        return [key]
    value = OmegaConf.select(given, key, throw_on_resolution_failure=False)
    parts = value if isinstance(value, DictConfig) else ()
    return [k for part in parts for k in _replaced(model, f"{key}.{part!s}", given)]


def _is_free(model: type[BaseModel], loc: Sequence[str]) -> bool:
    """Whether the field at `loc` is a mapping with keys of the user's own."""
    annotation: Any = model
    for part in loc:
        fields = [m.model_fields[part] for m in _models_in(annotation) if part in m.model_fields]
        annotation = fields[0].annotation if fields else None
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(kind) is dict for kind in kinds)


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, list, dict, tuple):
        return {m for a in get_args(annotation) for m in _models_in(a)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return set()
