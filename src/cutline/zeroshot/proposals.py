"""Segmentation by proposals and words (ZSSeg, 2112.14757): a MaskFormer trained on the seen classes proposes masks, and it
and a CLIP say together which class each is, seen or not. In Python:

    model = fit("runs/mine", "voc:VOC2012", ProposalsConfig())
    masks = predict(model, images)                            # a list of (H, W) class ids
    result = score(model, "voc:VOC2012")

`proposals` does it all in one call; `across` scores a trained one on other data, none of whose classes it has seen.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from cutline import towers
from cutline.config import apply, check
from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import world
from cutline.record import Result, fingerprint
from cutline.towers.encoder import Encoder
from cutline.towers.pictures import weights_hash
from cutline.towers.store import load_encoder
from cutline.train.device import device_of, process_group
from cutline.transfer.batches import Batch, resize_image
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.loop import train
from cutline.transfer.metrics import IGNORE, Confusion
from cutline.transfer.model import by_shape
from cutline.transfer.options import PyramidConfig, SplitName, autocast, seeded
from cutline.transfer.prepared import PreparedDense
from cutline.transfer.run import finished, run
from cutline.transfer.scoring import protocol, read_along, scored_part, shown
from cutline.transfer.store import WEIGHTS, describe, folder_of, stored_encoder
from cutline.zeroshot.learned import LearnConfig, Prefix, learn
from cutline.zeroshot.maskformer import MaskFormer, SeenLoss
from cutline.zeroshot.prompts import described, prompts
from cutline.zeroshot.readable import BEHIND, readable
from cutline.zeroshot.regions import Regions, class_map, ensemble
from cutline.zeroshot.texts import open_joint, text_classifier
from cutline.zeroshot.unseen import scores, zero_shot

STAGES = ("ensemble", "maskformer", "clip")
CLIP = "clip"  # folder of it beside the weights
LOOKS = ("threshold", "weight", "short", "split", "pictures", "batch", "precision", "device")  # of a trained model
ACROSS = ("threshold=0.4", "weight=0.5")


class ProposalsConfig(PyramidConfig):
    """Options of proposals; the defaults are ZSSeg's for COCO-Stuff, but `steps`, `batch` and `crop` (60,000, 32, 640).

    backbone: of MaskFormer, what `load_encoder` takes; None is the CLIP's own image tower. unseen: names of classes,
    "scenes", "voc" or "cocostuff" for a split of `unseen.SPLITS`, None for the data's own. prompts: a set or file of them,
    None is "openai", ImageNet's 80. learn: learn a prompt instead. queries, layers: of the decoder. mask, dice, no_object: weights of the
    loss. threshold: of a mask's probability, for its region. weight: of MaskFormer for seen classes, of CLIP for unseen.
    layer_decay: the share of `lr` that the backbone learns at.
    """

    backbone: str | None = None
    unseen: str | list[str] | None = None
    prompts: str | list[str] | None = None
    learn: LearnConfig | None = None
    queries: int = Field(100, ge=1)
    layers: int = Field(6, ge=1)
    mask: float = Field(20.0, ge=0)
    dice: float = Field(1.0, ge=0)
    no_object: float = Field(0.1, gt=0)
    threshold: float = Field(0.5, gt=0, lt=1)
    weight: float = Field(0.8, ge=0, le=1)
    channels: int | None = Field(256, ge=1)
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    layer_decay: float = Field(0.1, gt=0, le=1)
    power: float = Field(0.9, gt=0)
    clip: float | None = Field(0.01, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "ProposalsConfig":
        if self.learn is not None and self.prompts is not None:
            raise ValueError("a learned prompt stands in place of prompts: leave prompts or learn out")
        if self.test != "whole" or self.stride is not None or self.test_flip:
            raise ValueError("proposals are made of whole pictures: leave test, stride and test_flip out")
        return self


@dataclass
class Start:
    """A CLIP with a text tower and the backbone that MaskFormer begins with."""

    clip: towers.Model
    encoder: Encoder

    @property
    def hash(self) -> str:
        return fingerprint(weights_hash(self.clip), self.encoder.hash)


def start_of(model: str | towers.Model | Start, config: ProposalsConfig) -> Start:
    """What training begins with, on the CPU. Raises `CutlineError` for a model without a text tower."""
    if isinstance(model, Start):
        return model
    clip = open_joint(model)
    with seeded(config):
        encoder = load_encoder(clip if config.backbone is None else config.backbone)
    return Start(clip, encoder)


def fit(
    model: str | towers.Model | Start,
    data: str | DenseData,
    config: ProposalsConfig,
    out: Path | None = None,
    resume: bool = False,
) -> MaskFormer:
    """Train a MaskFormer on the seen classes of the data's train split, with the words of `model`, a CLIP, which is frozen.

    Pictures that show nothing seen are left out. The model's `config` has every open choice filled in.
    """
    start = start_of(model, config)
    opened, seen = zero_shot(open_data(data, "segment"), config.unseen)
    templates = None if config.learn else prompts(config.prompts or "openai")
    config = config.model_copy(update={"unseen": opened.notes["unseen"], "prompts": templates})
    prepared = PreparedDense(config, opened, max(start.encoder.channels))
    prepared.rows = prepared.split.usable(lambda sample: bool((sample.target != IGNORE).any()))
    if not prepared.rows:
        raise DataError(f"{opened.spec}: no picture of train shows a seen class. Give more pictures.")
    device, cast, settled = device_of(config.device), autocast(config), prepared.config
    regions = Regions(start.clip.to(device))
    vectors = torch.empty(0, 0)
    if config.learn is not None:
        vectors = learn(regions, config.learn, said(opened.classes), seen, prepared.split, prepared.rows, config.seed)
    with seeded(settled):
        texts, truncated = texts_of(start.clip, opened.classes, templates, vectors)
        made = MaskFormer(start.encoder, settled, opened.classes, texts, seen, vectors).to(device)
        made.source_hash, made.notes = start.hash, {"clip": start.clip.name or "model", "truncated": truncated}
        loss = SeenLoss(seen, config.no_object, config.mask, config.dice).to(device)

        def value(batch: Batch) -> Tensor:
            with cast():
                found = made.propose(made.normalise(batch.images.to(device, non_blocking=True)))
            return loss(made, found, batch.targets.to(device, non_blocking=True))  # type: ignore[no-any-return]

        train(made, prepared, prepared.batches(start.encoder.mean, IGNORE).iterate, value, out, resume)
    made.labels, made.skipped = prepared.split.counts()
    made.regions = regions
    if out is not None and world()[0] == 0:
        towers.save(start.clip, out / "model" / CLIP)
    return made


def said(names: Sequence[str]) -> list[str]:
    """Class names as one would say them, one a class: a proposal's words have no synonyms."""
    # The list of what is behind objects would make one word of it the background's.
    return [name if name == BEHIND else s[0] for name, s in zip(names, readable(names), strict=True)]


def texts_of(
    clip: towers.Model, names: Sequence[str], templates: Sequence[str] | None, vectors: Tensor
) -> tuple[Tensor, int]:
    """Unit vectors (K, D) of class names, in prompts or, without any, behind the learned vectors (tokens, W); and how many texts
    the context cut."""
    if templates is not None:
        texts = text_classifier(clip, [[name] for name in said(names)], templates)
        return texts.weights, texts.truncated
    with torch.no_grad():
        return Prefix(clip, said(names), len(vectors))(vectors.to(next(clip.parameters()).device)).cpu(), 0


@torch.no_grad()
def class_maps(model: MaskFormer, images: Tensor) -> Iterator[dict[str, Tensor]]:
    """Of each uint8 picture (B, 3, H, W) the scores (K, H, W) of MaskFormer, of CLIP on its masks, and of both.

    MaskFormer sees pictures resized to the config's `short`, and CLIP's regions are cut from them as they are.
    """
    config, device, size = model.config, model.texts.device, (images.shape[2], images.shape[3])
    factor = config.short / min(size) if config.short else 1.0
    shape = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    small = images if shape == size else torch.stack([resize_image(i, shape) for i in images])
    with autocast(config)():
        found = model.propose(model.normalise(small.to(device)))
    p_mf = model.class_logits(found.queries[-1], model.texts).softmax(-1)[..., :-1]
    for image, logits, p in zip(images, found.masks[-1], p_mf, strict=True):
        mask = model.full_masks(logits[None], shape)
        if shape != size:
            mask = F.interpolate(mask, size, mode="bilinear", align_corners=False)
        mask = mask[0].sigmoid()
        p_clip, valid = model.regions.probabilities(image, mask > config.threshold, model.texts)
        both = ensemble(p, p_clip, model.seen, config.weight)
        parts = {"ensemble": both, "maskformer": p, "clip": p_clip * valid[:, None]}
        yield {stage: class_map(part, mask) for stage, part in parts.items()}


def predict(
    model: MaskFormer, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], stage: str = "ensemble"
) -> list[NDArray[np.int64]]:
    """Class ids (H, W) of each uint8 (H, W, 3) picture. stage: "ensemble", "maskformer" or "clip"."""
    model.eval()
    batches = by_shape(((image, None) for image in images), model.config.batch)
    return [maps[stage].argmax(0).cpu().numpy() for batch, _ in batches for maps in class_maps(model, batch)]


def score(model: MaskFormer, data: str | DenseData, split: SplitName | None = None) -> Result:
    """hiou, seen_miou, unseen_miou, miou, macc and accuracy of the ensemble, shares of 1; the first three of each stage
    alone, as maskformer_… and clip_…; and iou by class. On `split` or the config's own."""
    opened, seen = zero_shot(open_data(data, "segment"), model.config.unseen)
    if opened.classes != model.classes:
        raise DataError(f"{opened.spec} has other classes than the model was trained on ({', '.join(model.classes)}).")
    return _measured(model, opened, "proposals", split, lambda confusion: scores(confusion, seen))


def across(folder: str | Path, data: str | DenseData, overrides: Sequence[str] = (), out: Path | None = None) -> Result:
    """A trained model's miou, macc and accuracy on other data, all of whose classes count as unseen; and each stage's.

    overrides: key=value of the options in `LOOKS`; the paper's threshold=0.4 and weight=0.5 where they say nothing else.
    """
    opened = open_data(data, "segment")
    model = load(folder, overrides=[*ACROSS, *overrides])
    with process_group(model.config.device):
        device = device_of(model.config.device)
        model.to(device)
        model.regions.clip.to(device)
        model.classes = opened.classes
        texts, cut = texts_of(model.regions.clip, opened.classes, model.config.prompts, model.vectors)
        model.notes = {**model.notes, "truncated": cut}
        model.texts = texts.to(model.texts.device)
        model.seen = torch.zeros(len(opened.classes), dtype=torch.bool, device=model.texts.device)
        result = _measured(model, opened, "segment", None, Confusion.scores)
        if out is not None and world()[0] == 0:
            result.write(out)
            _draw(model, opened, out / "samples.png")
    return result


def _measured(
    model: MaskFormer,
    data: DenseData,
    task: str,
    split: SplitName | None,
    numbers: Callable[[Confusion], dict[str, float]],
) -> Result:
    """What `numbers` says of every stage, and of the ensemble its usual scores too."""
    begun = time.monotonic()
    config = model.config.model_copy(update={"split": split or model.config.split})
    part = scored_part(config, data)
    confusions = {stage: Confusion(len(model.classes)) for stage in STAGES}
    model.eval()
    for images, targets in by_shape(((s.image, s.target) for s in read_along(part)), config.batch):
        for maps, target in zip(class_maps(model, images), targets, strict=True):
            for stage, confusion in confusions.items():
                confusion.update(maps[stage].argmax(0).cpu(), torch.from_numpy(target))
    metrics: dict[str, float] = {}
    for stage, confusion in confusions.items():
        confusion.join()
        own = "" if stage == "ensemble" else f"{stage}_"
        metrics |= {own + name: value for name, value in numbers(confusion).items()}
    iou = dict(zip(model.classes, confusions["ensemble"].iou().tolist(), strict=True))
    words = described([[name] for name in said(model.classes)], config.prompts or ["learned"])
    del words["prompts"]  # their number; the config's are the prompts themselves
    how = protocol(task, config, data, model, *part.counts(), **words)
    return Result(
        metrics=metrics | confusions["ensemble"].scores() | {"truncated": model.notes["truncated"]},
        per_class={"iou": {name: value for name, value in iou.items() if value == value}},  # absent classes are NaN
        protocol=how.model_copy(update={"encoder": model.notes["clip"]}),  # the config names the backbone
        seconds=time.monotonic() - begun,
    )


def _draw(model: MaskFormer, data: DenseData, path: Path) -> None:
    from cutline.transfer.draw import class_grid

    samples = shown(model.config, data)
    class_grid(path, samples, predict(model, [s.image for s in samples]), model.classes)


def load(folder: str | Path, device: str | torch.device = "cpu", overrides: Sequence[str] = ()) -> MaskFormer:
    """The model that `proposals` left in `folder`, with its CLIP, in eval mode; raises `DataError`.

    overrides: key=value of the options in `LOOKS`; others are a `ConfigError`.
    """
    path = folder_of(folder)
    content = describe(path)
    if content["kind"] != MaskFormer.__name__:
        raise DataError(f"{str(path)!r} holds a {content['kind']} and no proposals. Make some with zeroshot proposals.")
    for item in overrides:
        if item.partition("=")[0] not in LOOKS:
            raise ConfigError(f"{item!r} is no option of trained proposals: {', '.join(LOOKS)} can be changed.")
    try:
        config = check(ProposalsConfig, apply(content["config"], overrides, ProposalsConfig), given=overrides)
        tensors = load_file(path / WEIGHTS)
        parts = [tensors[name] for name in ("texts", "seen", "vectors")]
        model = MaskFormer(stored_encoder(content), config, content["classes"], *parts)
        model.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise DataError(f"cannot read the proposals in {str(path)!r}: {e}") from e
    model.source, model.source_hash = content["encoder"]["name"], content["encoder"]["hash"]
    model.labels, model.skipped, model.notes = content["trained"], content["skipped"], content["notes"]
    model.regions = Regions(towers.load(str(path / CLIP), device))
    return model.to(device).eval()


def is_trained(folder: str) -> bool:
    """Whether `folder` is what `proposals` left."""
    try:
        return bool(describe(folder_of(folder))["kind"] == MaskFormer.__name__)
    except DataError:
        return False


def proposals(
    model: str | towers.Model,
    data: str | DenseData,
    config: ProposalsConfig,
    out: Path | None = None,
    resume: bool = False,
) -> Result:
    """`fit`, then `score`; with `out`, write there result.json, the model, metrics.jsonl and a grid of predictions.

    resume: go on from the last checkpoint there; where the run is finished, its result, or a `ConfigError` if that is of
    another config, model or data.
    """
    opened, start = open_data(data, "segment"), start_of(model, config)
    if resume and out is not None and (out / "result.json").exists():
        chosen, _ = zero_shot(opened, config.unseen)
        templates = None if config.learn else prompts(config.prompts or "openai")
        asked = config.model_copy(update={"unseen": chosen.notes["unseen"], "prompts": templates})
        return finished(out, asked, chosen, start.hash)

    def draw(made: MaskFormer, path: Path) -> None:
        _draw(made, zero_shot(opened, made.config.unseen)[0], path)

    return run(fit, score, draw, start, opened, config, out, resume)
