"""What is settled before training: the config with its training open no more, the training rows, the encoder."""

from typing import Any, Generic, TypeVar

from cutline.errors import DataError
from cutline.towers.encoder import Encoder
from cutline.towers.store import load_encoder
from cutline.transfer.augment import CutDepth
from cutline.transfer.batches import Batches, Cut
from cutline.transfer.data import DenseData, Size, Split, labelled
from cutline.transfer.options import DenseConfig, TransferConfig, default_channels, look, seeded

EPOCHS, LEAST, MOST = 20, 400, 160_000  # of `steps` when not given
CROP = 512  # largest side of a crop when not given

C = TypeVar("C", bound=TransferConfig)
D = TypeVar("D", bound=DenseConfig)


class Prepared(Generic[C]):
    """A config with its training open no more, and the training pictures: a split of those chosen, and its rows.

    Which are chosen does not depend on what turns out not to be usable, so it is the same for every arm.
    """

    def __init__(self, config: C, data: DenseData) -> None:
        data.split(config.split)  # told before training, not after
        train, self.data = data.split("train"), data.fingerprint
        self.split = train.part(labelled(len(train), config.labels, config.seed, train.labels))
        self.rows = list(range(len(self.split)))
        self.steps = config.steps or min(max(LEAST, EPOCHS * len(self.rows) // config.batch), MOST)
        self.warmup = min(1500, self.steps // 20) if config.warmup is None else config.warmup
        self.config: C = config.model_copy(update={"steps": self.steps, "warmup": self.warmup})


class PreparedDense(Prepared[D]):
    """`Prepared` with the crop, and the widths of a head that has them, chosen as well."""

    def __init__(self, config: D, data: DenseData, width: int) -> None:
        super().__init__(config, data)
        self.crop = config.crop or self._crop(config.short)
        linear = getattr(config, "head", None) == "linear"  # which has no width of its own
        given = {} if linear else config.model_dump(include={"channels", "pyramid_channels"})
        channels = given.get("channels") or default_channels(width)
        widths = {"channels": channels, "pyramid_channels": given.get("pyramid_channels") or min(256, channels)}
        self.config = self.config.model_copy(update={"crop": self.crop, **{name: widths[name] for name in given}})
        look(self.config)  # a stride that leaves pixels out is told before training, too

    def batches(self, mean: tuple[float, float, float], empty: int, cutdepth: CutDepth | None = None) -> Batches:
        """Training batches. mean: the encoder's mean colour, around pictures smaller than the crop; empty: the target
        there; cutdepth: of depth."""
        c = self.config
        cut = Cut(self.crop, c.scale, c.flip, c.short, mean_colour(mean), empty, c.colour, cutdepth)
        return Batches(self.split, self.rows, c.batch, c.seed, cut)

    def _crop(self, short: int | None) -> tuple[int, int]:
        sizes = readable_sizes(self.split)
        smallest = min(min(s) for s in sizes)
        if len(sizes) == 1:
            height, width = (round(side * (short or smallest) / smallest) for side in sizes.pop())
            if max(height, width) <= CROP:
                return height, width
        side = min(CROP, short or smallest)
        return side, side


def readable_sizes(split: Split) -> set[Size]:
    """`Split.sizes`; raises `DataError` if there are none."""
    sizes = split.sizes()
    if not sizes:
        split.usable()  # says why
        raise DataError(f"{split.name} has no picture that can be read.")
    return sizes


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The colour that an encoder's normalisation makes zero, 0 … 255, of its mean in 0 … 1."""
    red, green, blue = (round(255 * m) for m in mean)
    return red, green, blue


def encoder_of(source: Any, config: TransferConfig) -> Encoder:
    """An `Encoder` as it is; a model, a run directory or any name that `towers.load` takes, wrapped as one.

    The random weights of "scratch:NAME" follow from the config's seed.
    """
    with seeded(config):
        return source if isinstance(source, Encoder) else load_encoder(source)
