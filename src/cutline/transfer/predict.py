"""A transferred model on pictures of your own: a drawing and the raw prediction of each. In Python:

    predict("runs/mine/segment-camvid", ["holiday", "photo.jpg"], Path("seen"))

The drawing is NAME.png. The prediction is NAME.ids.png, class ids that classes.txt beside it names (8 bits, or 16 for
more than 255 classes); NAME.depth.png, whole millimetres in 16 bits (NAME.depth.npy, metres, for models of more than
65.535 m); or NAME.json: COCO's parts of the objects, or the five best classes. Class ids and depth in `masks` or `depth`
folders beside the pictures are a `folder:` data set. Pictures are read upright, as their EXIF says, alpha over white.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.errors import ConfigError, DataError
from cutline.pairs.decode import BadPicture, decode
from cutline.progress import progress
from cutline.record import write_atomic
from cutline.train.device import device_of
from cutline.transfer import draw, masks
from cutline.transfer.store import describe, folder_of, load, task_of
from cutline.transfer.targets import PICTURES

BYTE = 255  # classes whose ids fit into 8 bits beside 255, which never counts
MILLIMETRES = 65535
BEST = 5  # classes told of a picture
Write = Callable[[Any, NDArray[np.uint8], Path, str], None]


@dataclass
class Predicted:
    """What came out: the folder, the pictures written, and those that could not be read with what is wrong."""

    folder: Path
    written: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def predict(
    run: str | Path,
    pictures: Sequence[str | Path],
    out: Path | None = None,
    overrides: Sequence[str] = (),
    task: str | None = None,
) -> Predicted:
    """Predict pictures (files, or folders of them) with the transferred model in `run`, into `out` (its `predicted/`).

    overrides: key=value of the options in `store.LOOKS`; task: what the model must have been trained for. A picture that
    cannot be read is told and skipped. Raises `CutlineError`.
    """
    path = _model_folder(run, task)
    kind = task_of(path, describe(path))

    def loaded() -> Any:
        model = load(path, overrides=["device=auto", *overrides])
        return model.to(device_of(model.config.device))

    return predict_with(loaded, kind, pictures, Path(out or Path(run) / "predicted"))


def predict_with(make: Callable[[], Any], task: str, pictures: Sequence[str | Path], out: Path) -> Predicted:
    """The same with the model that `make` gives, once the pictures are found and the folder is free for them."""
    found, write, suffixes = _found(pictures), *_WRITERS[task]
    names = _names(found, out, suffixes)
    model = make()
    out.mkdir(parents=True, exist_ok=True)
    if task == "segment":
        write_atomic(out / "classes.txt", "\n".join(model.classes).encode())
    report = Predicted(out)
    with progress("predicting", len(found), "pictures") as tick:
        for picture, name in zip(found, names, strict=True):
            try:
                image = decode(picture.read_bytes())
            except (BadPicture, OSError) as e:
                report.skipped.append((picture, str(e)))
            else:
                write(model, image, out, name)
                report.written.append(picture)
            tick()
    _tell(report)
    return report


def _model_folder(run: str | Path, task: str | None) -> Path:
    try:
        path = folder_of(run)
    except DataError as e:
        of = task or "*"
        there = sorted(str(p.parent.parent) for p in Path(run).glob(f"{of}-*/model/transfer.json"))
        hint = f"It holds {', '.join(there)}: name one of them." if there else (
            f"Train one first: cutline transfer {task or 'segment'} --encoder {run} --data SPEC."
        )  # fmt: skip
        raise DataError(f"{e} {hint}") from e
    kind = task_of(path, describe(path))
    if task is not None and kind != task:
        raise ConfigError(f"{str(run)!r} is a model of {kind}: cutline transfer {kind} --encoder {run} --predict …")
    return path


def _found(pictures: Sequence[str | Path]) -> list[Path]:
    """The files, in order, those of a folder by name."""
    found: list[Path] = []
    for given in map(Path, pictures):
        if given.is_dir():
            inside = sorted(p for p in given.iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise DataError(f"{str(given)!r} holds no picture ({', '.join(PICTURES)}).")
            found += inside
        elif given.is_file():
            found.append(given)
        else:
            raise DataError(f"there is no picture {str(given)!r}. Check the path.")
    if not found:
        raise DataError("there is nothing to predict: name a picture or a folder of pictures.")
    return list(dict.fromkeys(found))


def _names(found: Sequence[Path], out: Path, suffixes: Sequence[str]) -> list[str]:
    """NAME of each picture: its stem, or its whole name where two share a stem. Raises `DataError` where that does not
    keep all apart, and for a folder in which a picture would be written over."""
    stems = [p.stem for p in found]
    names = [p.name if stems.count(p.stem) > 1 else p.stem for p in found]
    files = {p.resolve(): p for p in found}
    targets: dict[Path, Path] = {}
    for picture, name in zip(found, names, strict=True):
        for target in ((out / (name + s)).resolve() for s in suffixes):
            other = targets.get(target) or files.get(target)
            if other is not None:
                raise DataError(
                    f"{target.name}, of {str(picture)!r}, would take the place of what belongs to {str(other)!r} in "
                    f"{str(out)!r}. Choose another --out for it."
                )
            targets[target] = picture
    return names


def _tell(report: Predicted) -> None:
    total = len(report.written) + len(report.skipped)
    if report.skipped:
        lines = [f"{p}: {why}" for p, why in report.skipped]
        told = f"{len(report.skipped)} of {total} pictures skipped:\n  " + "\n  ".join(lines)
        if not report.written:
            raise DataError(told)
        print(told, file=sys.stderr)


def write_classes(model: Any, image: NDArray[np.uint8], out: Path, name: str) -> None:
    """NAME.ids.png and NAME.png of what predicts class ids: it has `predict` and `classes`."""
    ids = model.predict([image])[0]
    _png(out / f"{name}.ids.png", ids.astype(np.uint8 if len(model.classes) <= BYTE else np.uint16))
    draw.class_picture(out / f"{name}.png", image, ids, model.classes)


def _depth(model: Any, image: NDArray[np.uint8], out: Path, name: str) -> None:
    metres = model.predict([image])[0]
    if model.config.top * 1000 > MILLIMETRES:
        buffer = io.BytesIO()
        np.save(buffer, metres)
        write_atomic(out / f"{name}.depth.npy", buffer.getvalue())
    else:
        _png(out / f"{name}.depth.png", (metres * 1000).round().clip(1, MILLIMETRES).astype(np.uint16))  # 0 is none
    draw.depth_picture(out / f"{name}.png", metres)


def _detect(model: Any, image: NDArray[np.uint8], out: Path, name: str) -> None:
    found = model.predict([image])[0]
    content = {
        "height": image.shape[0],
        "width": image.shape[1],
        "boxes": found["boxes"].round(2).astype(float).round(2).tolist(),
        "labels": [model.classes[k] for k in found["labels"]],
        "ids": found["labels"].tolist(),
        "scores": found["scores"].astype(float).round(4).tolist(),
    }
    if "masks" in found:
        packed = masks.encode(found["masks"]) if len(found["masks"]) else []
        content["masks"] = [{"size": list(m["size"]), "counts": m["counts"].decode()} for m in packed]
    _json(out / f"{name}.json", content)
    draw.object_picture(out / f"{name}.png", image, found, model.classes)


def _classify(model: Any, image: NDArray[np.uint8], out: Path, name: str) -> None:
    shares = model.probabilities([image])[0]
    best = np.argsort(-shares, kind="stable")[:BEST]
    names, values = [model.classes[i] for i in best], shares[best].astype(float).round(4).tolist()
    _json(out / f"{name}.json", {"classes": names, "shares": values})
    draw.share_picture(out / f"{name}.png", image, names, values)


# By the task: what predicts, and the ends of the names it may write.
_WRITERS: dict[str, tuple[Write, tuple[str, ...]]] = {
    "segment": (write_classes, (".png", ".ids.png")),
    "depth": (_depth, (".png", ".depth.png", ".depth.npy")),
    "detect": (_detect, (".png", ".json")),
    "classify": (_classify, (".png", ".json")),
}


def _png(path: Path, values: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False).encode())
