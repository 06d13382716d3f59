"""Pictures of three classes, told by the colour of a disc."""

import io

import numpy as np
from PIL import Image

THINGS = {"apple": (200, 30, 30), "leaf": (30, 180, 40), "sea": (30, 60, 200)}


def pixels(name: str, i: int, size: tuple[int, int] = (40, 32)) -> np.ndarray:
    """A disc of the class's colour somewhere on grey."""
    rng = np.random.default_rng([i, len(name)])
    image = np.full((*size, 3), 120) + rng.integers(-20, 20, (*size, 3))
    rows, columns = np.mgrid[: size[0], : size[1]]
    centre = rng.integers(10, min(size) - 10, 2)
    image[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 90] = THINGS[name]
    return image.clip(0, 255).astype(np.uint8)


def encoded(name: str, i: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(name, i)).save(buffer, form)
    return buffer.getvalue()
