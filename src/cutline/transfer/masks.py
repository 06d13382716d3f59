"""Masks of objects in COCO's forms: polygons, and run lengths (RLE) as a list of counts or as its packed string.

Run lengths count pixels down the columns, off first. They are read here, because a check of what they say is most of
the reading and the C code of the libraries trusts them blindly; polygons are drawn by faster-coco-eval, whose edges
are those that COCO's own scores are computed with.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError


def decode(segment: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of a "segmentation"; raises `ValueError` if it cannot be one of such a picture."""
    if isinstance(segment, list):
        return _polygons(segment, height, width)
    if not isinstance(segment, dict) or not {"counts", "size"} <= segment.keys():
        raise ValueError('neither a list of polygons nor {"counts", "size"}')
    if list(segment["size"]) != [height, width]:
        raise ValueError(f"run lengths for {list(segment['size'])} in a picture of {[height, width]} (height, width)")
    counts = segment["counts"]
    runs = np.array(counts if isinstance(counts, list) else unpack(counts), np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths that add up to {int(runs.sum())} and not to {height} × {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def unpack(packed: str | bytes) -> list[int]:
    """The counts in a packed string: five bits a character from "0" on, the least first, 32 for "more follows".

    From the fourth on a count is stored less the one two before it, and bit 16 of the last character is the sign.
    """
    counts: list[int] = []
    value = shift = 0
    for character in packed.encode() if isinstance(packed, str) else packed:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 50:
            raise ValueError("a packed string of run lengths that holds something else")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("a packed string of run lengths that ends within a number")
    return counts


def encode(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Packed run lengths of masks (N, H, W)."""
    found: list[dict[str, Any]] = _library().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return found


def _polygons(polygons: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(np.array(polygon, float)).all():
            raise ValueError("a polygon needs at least three pairs of finite numbers")
    if not polygons:
        raise ValueError("no polygons")
    library = _library()
    mask: NDArray[np.uint8] = library.decode(library.merge(library.frPyObjects(polygons, height, width)))
    return mask.astype(np.bool_)


def _library() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as e:
        raise DataError("masks of objects need the package faster-coco-eval: `pip install faster-coco-eval`.") from e
    return mask
