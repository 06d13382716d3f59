"""Save and load transferred models: `transfer.json` says how to build it, `model.safetensors` holds all its weights.

The encoder's architecture is stored as open_clip's model config, so loading needs neither the run it came from nor a
network; a timm image tower is built by its timm name.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutline.config import Config, apply, check
from cutline.errors import ConfigError, DataError
from cutline.record import version, write_atomic
from cutline.towers.config import TowerConfig
from cutline.towers.encoder import Encoder, wrap
from cutline.towers.model import Model
from cutline.towers.store import SCRATCH
from cutline.towers.store import build as build_tower
from cutline.towers.store import load as load_tower
from cutline.transfer.model import Transferred

CONFIG, WEIGHTS = "transfer.json", "model.safetensors"
TASKS = {
    "Segmenter": "segment",
    "DepthEstimator": "depth",
    "Classifier": "classify",
    "Detector": "detect",
}  # by the kind in `CONFIG`
_DENSE = ("test", "crop", "stride", "short", "test_flip", "precision", "device")
LOOKS = {
    "segment": (*_DENSE, "test_scales"),
    "depth": _DENSE,
    "classify": ("size", "short", "k", "temperature", "precision", "device"),
    "detect": ("size", "min_score", "detections", "precision", "device"),
}  # options of a trained model that its weights do not depend on
NEEDS = (("crop", "test", "slide"), ("stride", "test", "slide"), ("k", "head", "knn"), ("temperature", "head", "knn"))
C = TypeVar("C", bound=Config)
Loader = Callable[[dict[str, Any], dict[str, Tensor], Sequence[str]], Transferred]
LOADERS: dict[str, Loader] = {}  # of kinds that a room above this one makes, which enters them here and in TASKS


def save(model: Transferred, folder: str | Path) -> Path:
    """Write a `Segmenter`, `DepthEstimator`, `Classifier` or `Detector` into `folder`, the weights atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary)
        os.replace(temporary, folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    encoder: Any = model.encoder
    taps = list(getattr(encoder, "taps", encoder.strides))
    content = {
        "kind": type(model).__name__,
        "config": model.config.model_dump(mode="json"),  # type: ignore[operator, union-attr]
        "classes": getattr(model, "classes", []),
        "encoder": {
            "name": model.source,
            "hash": model.source_hash,
            "model_cfg": encoder.model_cfg,
            "preprocess": dict(encoder.visual.preprocess_cfg),
            "taps": taps if len(set(taps)) == len(taps) else None,
        },
        "masks": getattr(model, "masks", False),
        "notes": getattr(model, "notes", {}),
        "trained": model.labels,
        "skipped": model.skipped,
        "version": version(),
    }
    write_atomic(folder / CONFIG, json.dumps(content, indent=2).encode())
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = ()) -> Any:
    """The `Segmenter`, `DepthEstimator`, `Classifier` or `Detector` in `folder` (or in its `model/`), in eval mode;
    raises `DataError`.

    overrides: key=value of the options in `LOOKS`, how it is to look at pictures from now on; others are a `ConfigError`.
    """
    from cutline.transfer.classify import Classifier, ClassifyConfig
    from cutline.transfer.depth import DepthConfig, DepthEstimator
    from cutline.transfer.detect import DetectConfig
    from cutline.transfer.detector import Detector
    from cutline.transfer.segment import SegmentConfig, Segmenter

    path = folder_of(folder)
    try:
        content = describe(path)
        task_of(path, content)
        kind, tensors = content["kind"], load_file(path / WEIGHTS)
        model: Transferred
        if kind == "Segmenter":
            model = Segmenter(stored_encoder(content), config_of(SegmentConfig, content, overrides), content["classes"])
        elif kind == "DepthEstimator":
            model = DepthEstimator(stored_encoder(content), config_of(DepthConfig, content, overrides))
        elif kind == "Detector":
            objects = config_of(DetectConfig, content, overrides)
            model = Detector(stored_encoder(content), objects, content["classes"], content["masks"])
        elif kind == "Classifier":
            config = config_of(ClassifyConfig, content, overrides)
            model = Classifier(stored_encoder(content), config, content["classes"], content["trained"])
        else:
            model = LOADERS[kind](content, tensors, overrides)
        model.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise DataError(f"cannot read the transferred model in {str(path)!r}: {e}") from e
    model.source, model.source_hash = content["encoder"]["name"], content["encoder"]["hash"]
    model.labels, model.skipped = content["trained"], content["skipped"]
    return model.to(device).eval()


def config_of(kind: type[C], content: dict[str, Any], overrides: Sequence[str]) -> C:
    """The stored config with the overrides in it."""
    if not overrides:
        return kind.model_validate(content["config"])
    task, names = TASKS[content["kind"]], [item.split("=", 1)[0] for item in overrides]
    for name in names:
        if name not in LOOKS[task]:
            raise ConfigError(
                f"{name!r} is not an option of a trained model of {task}: {', '.join(LOOKS[task])} can be changed."
            )
    changed: Any = check(kind, apply(content["config"], overrides, kind), given=overrides)
    for name, other, value in NEEDS:
        if name in names and getattr(changed, other) != value:
            raise ConfigError(f"{name} is for {other}={value}: say that too, or leave {name} out.")
    if task == "classify" and changed.short < changed.size:
        raise ConfigError(f"short={changed.short} is less than size={changed.size}: raise short too.")
    return changed  # type: ignore[no-any-return]


def folder_of(folder: str | Path) -> Path:
    """Where the transferred model is: `folder` or its `model/`. Raises `DataError`."""
    path = next((p for p in (Path(folder), Path(folder) / "model") if (p / CONFIG).is_file()), None)
    if path is None:
        raise DataError(f"{str(folder)!r} holds no transferred model ({CONFIG}).")
    return path


def describe(path: Path) -> dict[str, Any]:
    """What `transfer.json` in a folder says of the model: kind, config, classes, encoder. Raises `DataError`."""
    try:
        content: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read the transferred model in {str(path)!r}: {e}") from e
    return content


def task_of(path: Path, content: dict[str, Any]) -> str:
    """The task of a model that `describe` told of; raises `DataError` for one that another room reads."""
    if (kind := content.get("kind")) not in TASKS:
        raise DataError(f"{str(path)!r} holds a {kind}, which is no transferred model: use it with cutline zeroshot.")
    return TASKS[kind]


def tower_of(content: dict[str, Any]) -> Model:
    """The model whose image tower was transferred, with random weights."""
    stored = content["encoder"]
    if not stored["model_cfg"]:
        return load_tower(SCRATCH + stored["name"].removeprefix(SCRATCH))
    model = build_tower(TowerConfig(custom=stored["model_cfg"]))
    model.visual.preprocess_cfg = stored["preprocess"]
    return model


def stored_encoder(content: dict[str, Any]) -> Encoder:
    """The encoder that `describe` tells of, with random weights."""
    taps = content["encoder"]["taps"]
    return wrap(tower_of(content), tuple(taps) if taps else None)
