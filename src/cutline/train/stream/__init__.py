"""The stream: rows of a source → augmented, tokenised batches, as a pure function of (seed, epoch, position)."""

from cutline.train.stream.order import Order
from cutline.train.stream.replay import Replay, Teacher, teachers_of
from cutline.train.stream.source import Cached, Source, check_columns, open_source
from cutline.train.stream.stream import Stream
from cutline.train.stream.text import TextConfig
from cutline.train.stream.transforms import Augment, Augmentation

__all__ = [
    "Augment",
    "Augmentation",
    "Cached",
    "Order",
    "Replay",
    "Source",
    "Stream",
    "Teacher",
    "TextConfig",
    "check_columns",
    "open_source",
    "teachers_of",
]
