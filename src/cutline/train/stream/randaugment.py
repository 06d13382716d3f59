"""RandAugment (Cubuk et al., arXiv 1909.13719) with torchvision's operations and magnitudes, on Pillow.

torchvision's own class draws from torch's global generator and hides what it drew. Here the operations are drawn as
plain (name, amount) pairs that can be stored, and carried out by one table. `amount` is what the operation takes: the
tangent of a shear, a share of the side for a translation, degrees, the factor of an enhancer less 1, bits taken away, a
share of 255.
"""

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

Operation = tuple[str, float]
BINS = 30  # magnitudes run from 0 to here
_NEAREST = Image.Resampling.NEAREST


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _NEAREST)


# name → (largest amount or None, signed, carry out)
_Table = dict[str, tuple[float | None, bool, Callable[[Image.Image, float], Image.Image]]]
OPERATIONS: _Table = {
    "Identity": (None, False, lambda i, a: i),
    "ShearX": (0.3, True, lambda i, a: _affine(i, 1, a, 0, 0, 1, 0)),
    "ShearY": (0.3, True, lambda i, a: _affine(i, 1, 0, 0, a, 1, 0)),
    "TranslateX": (150 / 331, True, lambda i, a: _affine(i, 1, 0, -int(a * i.width), 0, 1, 0)),
    "TranslateY": (150 / 331, True, lambda i, a: _affine(i, 1, 0, 0, 0, 1, -int(a * i.height))),
    "Rotate": (30.0, True, lambda i, a: i.rotate(a, _NEAREST)),
    "Brightness": (0.9, True, lambda i, a: ImageEnhance.Brightness(i).enhance(1 + a)),
    "Color": (0.9, True, lambda i, a: ImageEnhance.Color(i).enhance(1 + a)),
    "Contrast": (0.9, True, lambda i, a: ImageEnhance.Contrast(i).enhance(1 + a)),
    "Sharpness": (0.9, True, lambda i, a: ImageEnhance.Sharpness(i).enhance(1 + a)),
    "Posterize": (4.0, False, lambda i, a: ImageOps.posterize(i, round(8 - a))),
    "Solarize": (1.0, False, lambda i, a: ImageOps.solarize(i, 255 * (1 - a))),  # type: ignore[arg-type]
    "AutoContrast": (None, False, lambda i, a: ImageOps.autocontrast(i)),
    "Equalize": (None, False, lambda i, a: ImageOps.equalize(i)),
}

MOVING = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})  # those that move pixels


def draw_operations(count: int, magnitude: int, draw: Callable[[], float]) -> tuple[Operation, ...]:
    """`count` operations, each any of the table with equal chance, at `magnitude` (0 to `BINS`), the sign at random."""
    drawn = []
    for _ in range(count):
        name = list(OPERATIONS)[int(draw() * len(OPERATIONS))]
        largest, signed, _call = OPERATIONS[name]
        amount = (largest or 0.0) * magnitude / BINS
        drawn.append((name, -amount if draw() < 0.5 and signed else amount))
    return tuple(drawn)


def carry_out(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """RGB in, RGB out, of the same size; what comes in from outside is black."""
    for name, amount in operations:
        image = OPERATIONS[name][2](image, amount)
    return image


def is_operation(operation: Operation) -> bool:
    """Whether a stored operation is one that can be drawn, at any magnitude."""
    name, amount = operation
    largest, signed, _ = OPERATIONS.get(name, (-1.0, False, None))
    most = (largest or 0.0) * (1 + 1e-6)  # stored as float32 by others
    return (-most if signed else -1e-6) <= amount <= most
