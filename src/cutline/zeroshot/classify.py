"""Zero-shot classification: of the embeddings of the classes' names, the nearest to the picture's (2103.00020, section 3.1).

    class = argmax_k cos(image, w_k),   w_k as in `texts`

In Python: `classify("runs/mine", "imagefolder:pictures", ClassifyConfig(prompts="photo"))`. Pictures are read, embedded and
forgotten in batches, and nothing is trained.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from cutline import towers
from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import of_all, own_share, together, world
from cutline.progress import progress
from cutline.record import Protocol, Result, write_atomic
from cutline.towers.pictures import test_transform, weights_hash
from cutline.train.device import device_of, process_group
from cutline.transfer import draw
from cutline.transfer.batches import ahead
from cutline.transfer.classes import apart
from cutline.transfer.data import SKIP_SHARE, THREADS, DenseData, Skip, Split, open_data, tell_skipped
from cutline.transfer.metrics import Hits
from cutline.transfer.scoring import grouped
from cutline.zeroshot.encode import read_picture
from cutline.zeroshot.prompts import Names, class_names, described, prompts, several, spoken
from cutline.zeroshot.texts import TextClassifier, open_joint, text_classifier

SHOWN = 12  # pictures in samples.png
BEST = 5  # classes told of one picture
PROMPTS = "openai"  # where neither the config nor the data have any


class ClassifyConfig(Config):
    """prompts: a set ("openai", "simple", "photo", "name"), a file or a list; default those that come with the data, else
    "openai". names: of the classes, in the order of the data's and in their place (a file, `a; b, c`, "imagenet", or a list);
    default the data's own, with spaces for underscores. split: default test, else val, else what there is. pictures: how
    many are scored at most. batch: pictures a step; device: of a model that is loaded here; "auto" is a GPU if there is one."""

    prompts: str | list[str] | None = None
    names: str | list[str] | None = None
    split: str | None = None
    pictures: int | None = Field(None, ge=1)
    batch: int = Field(64, ge=1)
    device: str = "auto"


class Told(NamedTuple):
    """What a picture was taken for, its share of the softmax at the model's temperature, and what it is."""

    guess: int
    share: float
    truth: int


class Seen(NamedTuple):
    """Hits of all pictures, what some of them (by row) were taken for, and those that cannot be used."""

    hits: Hits
    told: dict[int, Told]
    bad: list[Skip]


def names_of(config: ClassifyConfig, data: DenseData) -> Names:
    """The names of the data's classes, of each its synonyms. Raises `ConfigError` if they are not as many as the classes, and
    where two classes have one name (but for ImageNet's own, of which two pairs are alike)."""
    if config.names is None:
        own = [name.replace("_", " ").strip() for name in data.classes]
        imagenet = class_names("imagenet")
        if own == [name for synonyms in imagenet for name in synonyms]:
            return imagenet
        if all(name.isdecimal() for name in own):
            print(f"The classes of {data.spec} are called 0, 1, …: unless pictures show digits, say names=FILE.",
                  file=sys.stderr)  # fmt: skip
        try:
            return spoken(data.classes)
        except ConfigError as e:
            raise ConfigError(f"{data.spec}: {e} Write all of them into names=FILE, a class a line.") from e
    names = class_names(config.names)
    if len(names) != len(data.classes):
        shown = ", ".join(data.classes[:3]) + ", …" * (len(data.classes) > 3)
        raise ConfigError(
            f"names has {len(names)} classes and {data.spec} has {len(data.classes)} ({shown}): name each of them once, in "
            "that order; synonyms share a line."
        )
    return names


def classify(
    model: towers.Model | str, data: str | DenseData, config: ClassifyConfig, out: Path | None = None
) -> Result:
    """Score `model` (a model, a run directory or a tag) on the pictures of `data`, a SPEC for "zeroshot"; on all processes of
    torchrun, with the result of one.

    metrics: top1, top5 and mean_class (see `metrics.Hits`) in 0…1, `chance_…` beside them, pictures, texts cut at the
    context; per class its accuracy. Writes `out/result.json` and `out/samples.png`. Raises `CutlineError` for a model without
    a text tower, for data and names that do not fit, and where more than 10 % of the pictures cannot be used.
    """
    began = time.monotonic()
    with process_group(config.device):
        loaded, opened = open_joint(model, device_of(config.device)), open_data(data, "zeroshot")
        names, templates = names_of(config, opened), prompts(config.prompts or opened.prompts or PROMPTS)
        split = opened.split(config.split or next(n for n in ("test", "val", *opened.splits) if n in opened.splits))
        count = min(config.pictures or opened.default_pictures or len(split), len(split))
        classifier = text_classifier(loaded, names, templates).to(next(loaded.parameters()).device)
        seen = _look(loaded, classifier, split, count, config.batch)
        skipped = tell_skipped(split.name, seen.bad, count)
        scored = count - len(seen.bad)
        accuracy = zip(apart(classifier.classes), seen.hits.accuracy().tolist(), strict=True)
        metrics = seen.hits.scores()
        metrics |= {f"chance_{k}": min(5 if k == "top5" else 1, len(names)) / len(names) for k in metrics}
        metrics |= {"classes": len(names), "pictures": scored, "truncated": classifier.truncated}
        metrics |= {f"skipped: {reason}": n for reason, n in skipped.items()}
        settings = {**described(names, templates), "transform": str(test_transform(loaded)), "scored": scored,
                    "skipped": len(seen.bad), **({"data": opened.notes} if opened.notes else {})}  # fmt: skip
        protocol = Protocol(
            task="zeroshot-classify", data=opened.spec, data_fingerprint=opened.fingerprint, split=split.name,
            settings=settings, encoder=loaded.name or "model", encoder_hash=weights_hash(loaded),
        )  # fmt: skip
        per_class = {"accuracy": {name: value for name, value in accuracy if value == value}}  # NaN: no picture of it
        result = Result(metrics=metrics, protocol=protocol, per_class=per_class, seconds=time.monotonic() - began)
        if out is not None and world()[0] == 0:
            _draw(out / "samples.png", split, seen.told, apart(classifier.classes))
            result.write(out)
    return result


def _look(model: towers.Model, classifier: TextClassifier, split: Split, count: int, batch: int) -> Seen:
    """What all processes see in the first `count` pictures, each in its share of them."""
    hits, told, bad = Hits(len(classifier.classes)), dict[int, Told](), list[Skip]()
    some = set(range(0, count, -(-count // SHOWN)))
    with together():
        for rows, cosines, truth in _scored(model, classifier, split, count, batch, bad):
            hits.update(cosines, truth)
            best = (model.logit_scale.detach().exp() * cosines).softmax(1).max(1)
            for i, row in enumerate(rows):
                if row in some:
                    told[row] = Told(int(best.indices[i]), float(best.values[i]), int(truth[i]))
    hits.join()
    everyone = of_all((told, bad))
    return Seen(
        hits, {k: v for part, _ in everyone for k, v in part.items()}, [b for _, part in everyone for b in part]
    )


@torch.no_grad()
def _scored(
    model: towers.Model, classifier: TextClassifier, split: Split, count: int, batch: int, bad: list[Skip]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, cosines (B, K) and classes (B,) of this process's share of the first `count` pictures that can be used, the others
    into `bad`.

    Raises `DataError` once there are too many of those, or none is left, and for embeddings that are not finite.
    """
    device, transform, training = classifier.weights.device, test_transform(model), model.training
    model.eval()

    def read(row: int) -> tuple[int, Tensor, int] | Skip:
        try:
            sample = split.read(row, keep=False)
        except Skip as e:
            return e
        return row, transform(Image.fromarray(sample.image)), int(sample.target)

    mine = own_share(count, batch)
    with progress(f"classify {split.name}", len(mine), "pictures", world()[0] == 0) as tick:
        for group in grouped(ahead(read, mine, THREADS), batch):
            bad += [found for found in group if isinstance(found, Skip)]
            if len(bad) > SKIP_SHARE * count or len(bad) == count:
                tell_skipped(split.name, bad, count)
            tick(len(group))
            usable = [found for found in group if not isinstance(found, Skip)]
            if not usable:
                continue
            rows, pictures, truth = zip(*usable)
            x = model.encode_image(torch.stack(pictures).to(device), normalize=True).float()
            if not torch.isfinite(x).all():
                raise DataError("some image embeddings are not finite; the model is broken, and no score can be given.")
            yield list(rows), classifier(x), torch.tensor(truth, device=device)
    model.train(training)


def _draw(path: Path, split: Split, told: dict[int, Told], classes: list[str]) -> None:
    images = [split.read(row, keep=False).image for row in told]
    guesses, truths = [classes[t.guess] for t in told.values()], [classes[t.truth] for t in told.values()]
    draw.name_grid(path, images, truths, guesses, [t.share for t in told.values()])


@torch.no_grad()
def name_picture(
    model: towers.Model | str, picture: Path, names: str | list[str], config: ClassifyConfig, out: Path
) -> dict[str, float]:
    """The shares of 1 of the classes `names` in one picture, the likeliest first, by the config's prompts.

    Writes out/STEM.png (the picture over its best classes) and out/STEM.json. Raises `CutlineError` for a picture that cannot
    be read.
    """
    loaded = open_joint(model, device_of(config.device)).eval()
    device = next(loaded.parameters()).device
    classifier = text_classifier(loaded, several(names), prompts(config.prompts or PROMPTS)).to(device)
    image = read_picture(picture)
    x = loaded.encode_image(test_transform(loaded)(Image.fromarray(image))[None].to(device), normalize=True).float()
    shares = (loaded.logit_scale.exp() * classifier(x)[0]).softmax(0).cpu().numpy()
    order = np.argsort(-shares, kind="stable")
    apart_names = apart(classifier.classes)
    found = {apart_names[i]: float(shares[i]) for i in order}
    best = list(found)[:BEST]
    draw.share_picture(out / f"{picture.stem}.png", image, best, [found[name] for name in best])
    write_atomic(out / f"{picture.stem}.json", json.dumps(found, ensure_ascii=False, indent=2).encode())
    return found
