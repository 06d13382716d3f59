"""Adapting an image–text encoder to a set of classes by pictures without labels; the method is `must`. In Python:

    adapt("runs/mine", "imagefolder:pictures", AdaptConfig(names="names.txt"), Path("adapted"))
    transfer.load("adapted").predict([picture])       # the adapted classifier
    towers.load("adapted")                            # the adapted image tower beside the text tower

Labels are read of the scored split alone.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from cutline import towers
from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import world
from cutline.record import Result, fingerprint, hash_files
from cutline.towers.pictures import weights_hash
from cutline.train.device import device_of
from cutline.transfer import store
from cutline.transfer.batches import ahead, stack_images
from cutline.transfer.classify import SHOWN, Classifier, ClassifyConfig
from cutline.transfer.data import THREADS, DenseData, Sample, Split, open_data
from cutline.transfer.loop import train
from cutline.transfer.metrics import Hits
from cutline.transfer.options import seeded
from cutline.transfer.prepared import Prepared
from cutline.transfer.run import finished, run
from cutline.transfer.scoring import grouped, protocol, read_along, scored_part, shown
from cutline.transfer.targets import PICTURES, read_image
from cutline.transfer.views import Square, Views
from cutline.zeroshot.must import AdaptConfig, Must, Pictures, masked_side
from cutline.zeroshot.prompts import Names, class_names, described, prompts, spoken
from cutline.zeroshot.texts import open_joint, text_classifier

NOTHING = np.zeros((), np.int64)  # where a picture's class would be


class Adapted(Must):
    """`Must` with all that is scored and saved. start: the CLIP it begins with, which stays as it is."""

    def __init__(self, start: towers.Model, classes: Sequence[str], names: Names, config: AdaptConfig) -> None:
        encoder = towers.load_encoder(start)
        self.square = masked_side(encoder, config)
        words = text_classifier(start, names, prompts(config.prompts))
        # Of a class with several names the mean: a linear classifier has no best one.
        vectors = torch.zeros(len(names), words.weights.shape[1]).index_add(0, words.owners, words.weights)
        super().__init__(encoder, F.normalize(vectors, dim=1), float(start.logit_scale.detach().exp()), config)
        self.source_hash = weights_hash(start)  # both towers: a run goes on with these words alone
        self.start = (encoder, start)  # in a tuple: not a part of this module
        self.words = copy.deepcopy(self.head.state_dict())
        self.classes, self.names, self.truncated = list(classes), names, words.truncated

    def classifiers(self) -> dict[str, Classifier]:
        """By the prefix of their scores: the words before, the adapted one, its teacher, the words on the adapted tower."""
        teacher, words = list(self.teacher), self.words
        parts = {"zeroshot_": (self.start[0], words), "": (self.encoder, self.head.state_dict()),
                 "ema_": (teacher[0], teacher[1].state_dict()), "words_": (self.encoder, words)}  # fmt: skip
        return {prefix: self._classifier(*part) for prefix, part in parts.items()}

    def _classifier(self, encoder: Any, head: dict[str, Tensor]) -> Classifier:
        c = self.config
        config = ClassifyConfig(
            head="cosine", size=encoder.size, short=encoder.size, batch=c.batch, precision=c.precision, device=c.device
        )
        made = Classifier(encoder, config, self.classes)
        made.head.load_state_dict(head)
        made.source, made.source_hash, made.labels = self.source, self.source_hash, self.labels
        return made.to(device_of(c.device)).eval()

    def save(self, folder: Path) -> None:
        """The adapted image tower beside its text tower, as open_clip's model, and the adapted classifier."""
        store.save(self.classifiers()[""], folder)
        whole = copy.deepcopy(self.start[1])
        whole.visual.load_state_dict(self.encoder.visual.state_dict())
        towers.save(whole, folder)


class Unlabelled:
    """Batches of pairs of views and masks: pure functions of (seed, step), as those of `Views`.

    The weak view is a random square of the picture with its short side resized to the tower's size, the strong one a
    random crop, mirrored or not, with RandAugment. square: side of what is masked, in patches of `patch` pixels.
    """

    def __init__(
        self, split: Split, rows: Sequence[int], config: AdaptConfig, size: int, patch: int, square: int
    ) -> None:
        self.views = Views(
            split, rows, config.batch, config.seed, Square(size, size), config.scale, config.flip, config.operations,
            config.magnitude,
        )  # fmt: skip
        self.mask, self.size, self.cells, self.square = config.mask, size, size // patch // square, square

    def make(self, step: int) -> Pictures:
        """This process's share of batch `step`."""
        views = self.views
        strong, weak, masks, keys = [], [], [], []
        for place, rng in views.drawn(step):
            place, (first, second) = views.shown(place, rng, partial(self._pair, rng=rng))
            strong.append(first)
            weak.append(second)
            masks.append(random_mask(self.cells, self.square, self.mask, rng))
            keys.append(views.split.keys[views.rows[place]])
        return Pictures(torch.stack(strong), torch.stack(weak), torch.from_numpy(np.stack(masks)), keys)

    def _pair(self, row: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The strong and the weak view of a picture."""
        strong = self.views.view(row, self.views.flip and bool(rng.random() < 0.5), rng)[0]
        return strong, random_square(self.views.split.read(row).image, self.size, rng)

    def iterate(self, start: int, stop: int) -> Iterator[Pictures]:
        """Batches `start` … `stop` - 1, a few made ahead by threads."""
        return ahead(self.make, range(start, stop), THREADS)


def random_square(image: NDArray[np.uint8], size: int, rng: np.random.Generator) -> Tensor:
    """(H, W, 3) uint8 → (3, size, size): its short side resized to `size`, cut at random along the other."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if min(x.shape[1:]) != size:
        x = v2.functional.resize(x, [size], v2.InterpolationMode.BICUBIC, antialias=True)
    top, left = (int(rng.integers(0, side - size + 1)) for side in x.shape[1:])
    return x[:, top : top + size, left : left + size]


def random_mask(cells: int, square: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which of (cells · square)² patches are masked, by rows: ⌈cells² · share⌉ squares of square² patches."""
    mask = np.zeros(cells * cells, np.bool_)
    mask[rng.permutation(cells * cells)[: math.ceil(cells * cells * share)]] = True
    return mask.reshape(cells, cells).repeat(square, 0).repeat(square, 1).reshape(-1)


def without_labels(data: DenseData, config: AdaptConfig) -> DenseData:
    """The data with a train split of pictures alone: its own, or those of the folder `config.unlabelled`."""
    if config.unlabelled is None:
        known = data.split("train")
        split = Split("train", known.keys, lambda row: replace(known.read(row), target=NOTHING))
        return replace(data, splits={**data.splits, "train": split})
    root = Path(config.unlabelled)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"unlabelled={str(root)!r} is no folder with pictures in it ({', '.join(PICTURES)}).")
    keys = [p.relative_to(root).as_posix() for p in found]
    split = Split("train", keys, lambda row: Sample(keys[row], read_image(found[row]), NOTHING))
    contents = fingerprint(data.fingerprint, hash_files(found))
    return replace(data, splits={**data.splits, "train": split}, fingerprint=contents)


def names_of(data: DenseData, config: AdaptConfig) -> Names:
    """Of each class of the data its names. Raises `ConfigError` where there are more or fewer."""
    names = spoken(data.classes) if config.names is None else class_names(config.names)
    if len(names) != len(data.classes):
        raise ConfigError(f"names has {len(names)} classes, and {data.spec} has {len(data.classes)}.")
    return names


def fit(start: towers.Model, data: DenseData, config: AdaptConfig, out: Path | None, resume: bool) -> Adapted:
    """Train on the train split of `without_labels`. The model's `config` has its steps filled in."""
    names = names_of(data, config)
    prepared = Prepared(config, data)
    if config.steps is None:
        prepared.steps = max(1, config.epochs * len(prepared.rows) // config.batch)
        prepared.config = prepared.config.model_copy(update={"steps": prepared.steps})
    with seeded(config):
        model = Adapted(start, data.classes, names, prepared.config)
        encoder = model.encoder
        pictures = Unlabelled(prepared.split, prepared.rows, config, encoder.size, encoder.multiple, model.square)
        train(model, prepared, pictures.iterate, model.loss, out, resume)
    model.labels, model.skipped = prepared.split.counts()
    if not model.sure and world()[0] == 0:
        print(
            f"In {int(model.taken)} steps the model was never surer of a picture than tau={config.tau}: nothing was learnt from "
            "its own labels. Lower tau, or begin with a model that knows these classes.",
            file=sys.stderr,
        )
    return model


def score(model: Adapted, data: DenseData) -> Result:
    """top1, top5 and mean_class (`metrics.Hits`) of each of `Adapted.classifiers` on the config's split.

    sure: the share of pictures that were learnt from in training; unsure_steps: those without such a picture;
    truncated: texts that the context cut.
    """
    begun, config = time.monotonic(), model.config
    scored = scored_part(config, data)
    kinds = model.classifiers()
    hits = {prefix: Hits(len(model.classes)) for prefix in kinds}
    square, device = kinds[""].square, device_of(config.device)
    samples = read_along(scored, lambda sample: replace(sample, image=square(sample.image)))
    for part in grouped(samples, config.batch):
        truth = torch.tensor([int(s.target) for s in part], device=device)
        views = stack_images([s.image for s in part])
        for prefix, kind in kinds.items():
            hits[prefix].update(kind.logits(views), truth)
    metrics: dict[str, float] = {}
    for prefix, found in hits.items():
        found.join()
        metrics |= {prefix + name: value for name, value in found.scores().items()}
    metrics |= {"sure": int(model.sure) / max(1, int(model.seen)), "unsure_steps": int(model.unsure)}
    metrics["truncated"] = model.truncated
    each = {
        f"{prefix}accuracy": dict(zip(model.classes, hits[prefix].accuracy().tolist())) for prefix in ("zeroshot_", "")
    }
    words = described(model.names, prompts(config.prompts))
    return Result(
        metrics=metrics,
        per_class={name: {k: v for k, v in found.items() if v == v} for name, found in each.items()},  # NaN: none there
        protocol=protocol("adapt", config, data, model, *scored.counts(), words=words),
        seconds=time.monotonic() - begun,
    )


def adapt(
    model: str | towers.Model, data: str | DenseData, config: AdaptConfig, out: Path | None = None, resume: bool = False
) -> Result:
    """`fit`, then `score`, on all processes of torchrun; with `out`, write there result.json, model/, metrics.jsonl, curve.png
    and a grid of predictions. resume: go on from the last checkpoint there; a finished run's result is given back."""
    start, opened = open_joint(model, device_of(config.device)), without_labels(open_data(data, "classify"), config)
    if resume and out is not None and (out / "result.json").exists():
        result = finished(out, config, opened, weights_hash(start))
        if result.protocol.settings["words"] != described(names_of(opened, config), prompts(config.prompts)):
            raise ConfigError(f"{out} holds a finished run of other names or prompts. Choose another --out for these.")
        return result

    def draw(adapted: Adapted, path: Path) -> None:
        from cutline.transfer.draw import name_grid

        samples, kind = shown(adapted.config, opened, SHOWN), adapted.classifiers()[""]
        shares = kind.probabilities([s.image for s in samples])
        true, said = [kind.classes[int(s.target)] for s in samples], [kind.classes[i] for i in shares.argmax(1)]
        name_grid(path, [s.image for s in samples], true, said, shares.max(1).tolist())
        curve(path.with_name("curve.png"), path.with_name("metrics.jsonl"))

    return run(fit, score, draw, start, opened, config, out, resume, Adapted.save)


def curve(path: Path, log: Path) -> None:
    """Draw a log's share of sure pictures, and its losses, over the steps."""
    from matplotlib.figure import Figure

    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "sure" in line]
    figure = Figure((9, 3), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["sure"] for line in lines])
    left.set(title="share of pictures that the teacher is sure of", xlabel="step", ylim=(0, 1))
    for name in ("pseudo", "fair", "pixels", "align"):
        if name in lines[0]:
            right.plot(steps, [line[name] for line in lines], label=name)
    right.set(title="losses", xlabel="step", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path)
