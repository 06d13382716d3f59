"""Pictures and their targets from files: uint8 pictures, class maps by a table of labels, depth maps in metres.

Every reader raises `Skip`, or an error that the caller turns into one, for a file that cannot be used.
"""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.errors import DataError
from cutline.transfer.data import Skip
from cutline.transfer.metrics import IGNORE

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASKS = (".png", ".tif", ".tiff", ".bmp")
DEPTHS = (".png", ".tif", ".tiff", ".npy", ".exr")
UNKNOWN = -2  # in a table of labels: a label that must not occur


def class_names(kind: str) -> list[str]:
    """Names of the classes of a public data set, in the order of their ids."""
    text = resources.files("cutline.transfer").joinpath("classes", f"{kind}.txt").read_text(encoding="utf-8")
    return text.splitlines()


def label_table(ids: Mapping[int, int], ignored: Iterable[int] = (255,)) -> NDArray[np.int16]:
    """From a label as stored in a file to a class id, `IGNORE`, or `UNKNOWN`; (65536,)."""
    table = np.full(1 << 16, UNKNOWN, np.int16)
    table[list(ids)] = list(ids.values())
    table[list(ignored)] = IGNORE
    return table


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; raises `Skip`."""
    if not path.is_file():
        raise Skip("picture missing", f"{path} is not there.")
    try:
        with Image.open(path) as picture:
            if not picture.mode.startswith("I"):
                return np.array(picture.convert("RGB"))
            grey = (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)  # PIL's own conversion clips at 255
            return np.repeat(grey[:, :, None], 3, axis=2)
    except Exception as e:
        raise Skip("picture broken", f"{path} cannot be read: {e}") from e


def header_size(path: Path) -> tuple[int, int] | None:
    """(height, width) from a picture's header; None if there is no such picture, which is told when it is read."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except Exception:
        return None


def read_index(path: Path) -> NDArray[Any]:
    """The labels (H, W) in a single-channel picture, also one with a palette."""
    with Image.open(path) as picture:
        values = np.array(picture)
    if values.ndim != 2:
        raise ValueError(f"it has {values.shape[-1]} channels; a mask has one, with the class id of each pixel")
    return values


def read_mask(path: Path, table: NDArray[np.int16], advice: str) -> NDArray[np.int16]:
    """Class ids (H, W) of a mask by `label_table`; advice: what to do about labels that are not in it ({labels})."""
    values = read_index(path).astype(np.int64)
    mapped: NDArray[np.int16] = table[values.clip(0, len(table) - 1)]
    if (mapped == UNKNOWN).any() or values.min() < 0:
        wrong = [str(v) for v in np.unique(values[(mapped == UNKNOWN) | (values < 0)]).tolist()[:5]]
        told = advice.format(labels="+".join(wrong))
        raise Skip(
            "label out of range",
            f"{path} has labels {', '.join(wrong)} that are none of the {table.max() + 1} classes: {told}",
        )
    return mapped


def read_depth(path: Path, scale: float | None) -> NDArray[np.float32]:
    """Metres (H, W), 0 where there is no reading (zero, negative, NaN or infinite).

    scale: metres per stored unit; None is 0.001 for integers and 1 for floats.
    """
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
