"""One row's picture, decoded no further than its views need.

A JPEG is decoded at a half, quarter or eighth where that is enough for the views made from it (`decode_size`). A stored
augmentation is replayed by `replay_view`, by the stream and by the teachers that `cutline reinforce` asks: at which fraction
it decodes depends on the augmentation and the view's size alone, and not on what else is made of the picture, so that
both see the same pixels, to the bit, at the same size.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import simplejpeg

from cutline.pairs.decode import decode
from cutline.pairs.headers import jpeg_orientation
from cutline.train.stream.transforms import Augment, Augmentation, Picture, decode_size


class RowPicture:
    """A picture as a source gives it: encoded bytes, or an array (H, W, 3) uint8. Raises `BadPicture` as `decode` does.

    size: (H, W) of the whole picture, upright.
    """

    def __init__(self, image: Any) -> None:
        self._image = image
        self._decoded: dict[int | None, Picture] = {}  # by the shorter side asked for; None: all of it
        shape = image.shape[:2] if isinstance(image, np.ndarray) else _jpeg_shape(image)
        if shape is None:  # not a JPEG, so there is no decoding at a fraction
            self._image = image = decode(image)
            shape = image.shape[:2]
        self.size: tuple[int, int] = (int(shape[0]), int(shape[1]))

    def pixels(self, views: Iterable[tuple[Augmentation, int]]) -> Picture:
        """The picture (H, W, 3), decoded as far as these views, each with its size, need it."""
        if isinstance(self._image, np.ndarray):
            return self._image
        side = decode_size(views)
        if side not in self._decoded:
            self._decoded[side] = decode(self._image, side)
        return self._decoded[side]


def replay_view(picture: RowPicture, augment: Augment, how: Augmentation, size: int) -> Picture:
    """The view (3, size, size) uint8 of a stored augmentation. `augment` gives the interpolation it was stored with."""
    return augment.apply(picture.pixels([(how, size)]), how, size)


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an upright JPEG without decoding it, None for anything else."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if jpeg_orientation(data) >= 5 else (height, width)
