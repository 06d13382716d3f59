"""A folder of your own: {train,val[,test]}/{images,masks|depth}, a picture and its target sharing their stem.

Class maps: single-channel index pictures (PNG, also with a palette). `classes.txt` names the classes, one a line;
without it there are as many as the largest label in train says. Label 255, labels given as `ignore=0+255` and classes
named unlabelled, void or ignore do not count. Depth maps: integer PNG or TIFF times `scale` (default 0.001:
millimetres), or float TIFF, npy and EXR (with the OpenEXR package) in metres, times `scale` if given. Zero, negative,
NaN and infinite values are pixels without a reading.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.errors import DataError
from cutline.record import fingerprint, hash_files
from cutline.transfer.data import DenseData, Sample, Skip, Split, Task
from cutline.transfer.metrics import IGNORE

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
TARGETS = {"segment": (".png", ".tif", ".tiff", ".bmp"), "depth": (".png", ".tif", ".tiff", ".npy", ".exr")}
FOLDERS = {"segment": "masks", "depth": "depth"}
NO_CLASS = {"unlabelled", "unlabeled", "void", "ignore"}


def open(rest: str, task: Task) -> DenseData:
    """Open `folder:PATH[,ignore=0+255][,scale=0.001]`."""
    if task == "detect":
        from cutline.transfer.coco_boxes import open_folder

        return open_folder(rest)
    path, options = _options(rest)
    root = Path(path)
    pairs = {name: _pairs(root / name, task) for name in ("train", "val", "test") if (root / name).is_dir()}
    for needed in ("train", "val"):
        if not pairs.get(needed):
            layout = f"{{train,val}}/{{images,{FOLDERS[task]}}}"
            raise DataError(f"folder:{path} has no pictures in {root / needed / 'images'}. The layout is {layout}.")
    notes: dict[str, Any] = {}
    classes: list[str] = []
    read: Callable[[Path], NDArray[Any]]
    if task == "segment":
        ignored = {255, *(int(v) for v in str(options.get("ignore", "255")).split("+"))}
        classes, table = _classes(root, ignored, [target for _, target in pairs["train"]])
        notes["ignore"] = sorted(ignored)

        def read(path: Path) -> NDArray[Any]:
            return _mask(path, table)
    else:
        scale = float(options["scale"]) if "scale" in options else None
        notes["scale"] = "0.001 for integers" if scale is None else scale

        def read(path: Path) -> NDArray[Any]:
            return _depth(path, scale)

    splits = {name: _split(name, found, read) for name, found in pairs.items()}
    files = [p for found in pairs.values() for pair in found for p in pair if p is not None]
    contents = fingerprint(hash_files(files), {k: [p.stem for p, _ in v] for k, v in pairs.items()}, classes, notes)
    return DenseData(task, f"folder:{rest}", splits, classes, contents, notes=notes)


def _options(rest: str) -> tuple[str, dict[str, str]]:
    path, *items = rest.split(",")
    options = dict(item.partition("=")[::2] for item in items)
    for name in options:
        if name not in ("ignore", "scale"):
            raise DataError(f"folder:{rest}: unknown option {name!r}; there are ignore=0+255 and scale=0.001.")
    try:
        [int(v) for v in options.get("ignore", "0").split("+")]
        float(options.get("scale", 1))
    except ValueError as e:
        raise DataError(f"folder:{rest}: {e}. Write for example ignore=0+255 or scale=0.001.") from e
    return path, options


def _pairs(folder: Path, task: Task) -> list[tuple[Path, Path | None]]:
    """Pictures of a split by name, each with its target file, or None where there is none."""
    images, targets = folder / "images", folder / FOLDERS[task]
    if not images.is_dir() or not targets.is_dir():
        raise DataError(f"{folder} has no {'images' if not images.is_dir() else FOLDERS[task]} folder in it.")
    by_stem = {p.stem: p for p in sorted(targets.iterdir()) if p.suffix.lower() in TARGETS[task]}
    pictures = sorted(p for p in images.iterdir() if p.suffix.lower() in PICTURES)
    return [(p, by_stem.get(p.stem)) for p in pictures]


def _split(name: str, pairs: list[tuple[Path, Path | None]], read_target: Callable[[Path], NDArray[Any]]) -> Split:
    def read(row: int) -> Sample:
        picture, target = pairs[row]
        if target is None:
            raise Skip("no target", f"{picture} has no mask or depth map of the same name beside it.")
        image = read_image(picture)
        try:
            values = read_target(target)
        except DataError:  # a package is missing, and the file is not to blame
            raise
        except Exception as e:  # broken bytes make Pillow's plug-ins and NumPy raise errors of many kinds
            raise Skip("target broken", f"{target} cannot be read: {e}") from e
        if values.shape != image.shape[:2]:
            (h, w), (th, tw) = image.shape[:2], values.shape
            raise Skip("size differs", f"{target} is {tw}x{th} and its picture {w}x{h}: they must be equal.")
        if not (values != IGNORE).any() if values.dtype == np.int16 else not values.any():
            raise Skip("target empty", f"{target} has no labelled pixel.")
        return Sample(picture.stem, image, values)

    return Split(name, [p.stem for p, _ in pairs], read)


def read_image(path: Path) -> NDArray[np.uint8]:
    """A picture (H, W, 3); raises `Skip`."""
    try:
        with Image.open(path) as picture:
            if not picture.mode.startswith("I"):
                return np.array(picture.convert("RGB"))
            grey = (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)  # PIL's own conversion clips at 255
            return np.repeat(grey[:, :, None], 3, axis=2)
    except Exception as e:
        raise Skip("picture broken", f"{path} cannot be read: {e}") from e


def _classes(root: Path, ignored: set[int], masks: list[Path | None]) -> tuple[list[str], NDArray[np.int16]]:
    """Names of the classes, and a table from a file's label to our class id, IGNORE, or -2 for out of range."""
    names_file = root / "classes.txt"
    if names_file.is_file():
        names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        names = [str(k) for k in range(_largest([m for m in masks if m is not None], ignored) + 1)]
    labels = [k for k, name in enumerate(names) if name.lower() not in NO_CLASS and k not in ignored]
    if not labels:
        raise DataError(f"{root} has no classes: classes.txt is empty, or no mask has a label that counts.")
    table = np.full(1 << 16, -2, np.int16)
    table[[k for k in range(len(names)) if k not in labels]] = IGNORE
    table[sorted(ignored)] = IGNORE
    table[labels] = np.arange(len(labels))
    return [names[k] for k in labels], table


def _largest(masks: list[Path], ignored: set[int]) -> int:
    largest = -1
    for path in masks:
        try:
            largest = max([largest, *(set(np.unique(_index(path)).tolist()) - ignored)])
        except Exception:
            continue  # counted when the sample is read
    return largest


def _index(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        values = np.array(picture)
    if values.ndim != 2:
        raise ValueError(f"it has {values.shape[-1]} channels; a mask has one, with the class id of each pixel")
    return values


def _mask(path: Path, table: NDArray[np.int16]) -> NDArray[np.int16]:
    values = _index(path).astype(np.int64)
    mapped: NDArray[np.int16] = table[values.clip(0, len(table) - 1)]
    if (mapped == -2).any() or values.min() < 0:
        wrong = np.unique(values[(mapped == -2) | (values < 0)]).tolist()
        shown = ", ".join(str(v) for v in wrong[:5])
        hint = f"name them in classes.txt or leave them out with ignore={'+'.join(str(v) for v in wrong[:5])}."
        raise Skip("label out of range", f"{path} has labels {shown} beyond the {int(table.max()) + 1} classes: {hint}")
    return mapped


def _depth(path: Path, scale: float | None) -> NDArray[np.float32]:
    """Metres; 0 where there is no reading."""
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False)
    elif path.suffix.lower() == ".exr":
        values = _exr(path)
    else:
        with Image.open(path) as picture:
            values = np.array(picture)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze()
    if values.ndim != 2:
        raise ValueError(f"a depth map has one channel, and this has the shape {values.shape}")
    factor = scale if scale is not None else 0.001 if np.issubdtype(values.dtype, np.integer) else 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        metres: NDArray[np.float32] = values.astype(np.float32) * np.float32(factor)
    metres[~np.isfinite(metres) | (metres < 0)] = 0
    return metres


def _exr(path: Path) -> NDArray[Any]:
    try:
        import OpenEXR
    except ImportError as e:
        raise DataError(f"{path} is EXR: `pip install OpenEXR` to read it, or store depth as npy or 16-bit PNG.") from e
    try:
        channels = OpenEXR.File(str(path)).channels()
    except Exception as e:  # the reader raises bare RuntimeErrors of its own
        raise ValueError(str(e)) from e
    name = next((n for n in ("Z", "Y", "R", "V") if n in channels), next(iter(channels)))
    values: NDArray[Any] = np.asarray(channels[name].pixels)
    return values
