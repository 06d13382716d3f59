"""Encoded pictures to RGB pixels; shared by `pairs check` and the training stream.

JPEG in RGB or grey goes to libjpeg-turbo (simplejpeg), which can decode at n/8 of the size for almost nothing; all else
goes to Pillow. What comes out is always upright 8-bit RGB:

- the EXIF orientation is applied (captions speak of the picture as people see it);
- CMYK is converted, 16 bits are scaled by 1/257 to 8, alpha is laid over white, an animation gives its first frame;
- more than `MAX_PIXELS` pixels, a picture cut off, and bytes that are no picture raise `BadPicture`.
"""

import io
import warnings
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from cutline.errors import DataError
from cutline.pairs.headers import jpeg_orientation, kind_of

MAX_PIXELS = 100_000_000
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
# Pillow warns from its own, lower limit on; ours raises.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadPicture(DataError):
    """A picture that cannot be decoded. `reason`: "empty", "not a picture", "truncated", "bomb" or "broken"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"a picture cannot be used ({reason}): {detail}")
        self.reason = reason


def decode(data: bytes, min_size: int | None = None) -> Pixels:
    """RGB pixels (H, W, 3) uint8 of an encoded picture.

    With `min_size` a JPEG is decoded at the smallest n/8 of its size whose two sides are still at least `min_size`
    pixels (or at its own size where that is smaller); other kinds come at full size. Raises `BadPicture`.
    """
    if not data:
        raise BadPicture("empty", "it has no bytes.")
    if kind_of(data) == "jpeg":
        pixels = _jpeg(data, min_size or 0)
        if pixels is not None:
            return pixels
    return _pillow(data)


def _jpeg(data: bytes, min_size: int) -> Pixels | None:
    """The fast path; None sends the picture to Pillow, which is the judge of what is broken."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(width, height)
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=min_size, min_width=min_size)
    except ValueError as e:
        if "remature end" in str(e):
            raise BadPicture("truncated", "the JPEG data end too early.") from e
        return None
    return _upright(pixels, jpeg_orientation(data))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise BadPicture("bomb", f"{width} × {height} pixels are more than the {limit} million allowed.")


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _pillow(data: bytes) -> Pixels:
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as e:
        raise BadPicture("not a picture", f"no decoder knows it; it begins with {data[:8]!r}.") from e
    except Image.DecompressionBombError as e:
        raise BadPicture("bomb", str(e)) from e
    except (OSError, ValueError, SyntaxError) as e:
        raise BadPicture("broken", f"{e}.") from e
    _check_size(*image.size)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(_rgb(image), dtype=np.uint8)
    except Exception as e:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, IndexError, … on broken bytes
        cut = "truncated" in str(e) or "not enough" in str(e) or isinstance(e, EOFError)
        raise BadPicture("truncated" if cut else "broken", f"{e}.") from e


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits in I;16 (or in I, from older Pillow)
        wide = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise OSError("pixels of floating point have no known range; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
