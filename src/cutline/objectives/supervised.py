"""Supervised classification by labels from a column: the baseline that captions are to beat (2405.08911, abstract).

    several labels a picture   L = mean over labelled pictures of  Σ_c BCE(z_c, [c is among the picture's labels])
    one label (`single`)       L = mean over labelled pictures of  −log softmax(z)_label,    z = linear(√D · picture)

The first sums over the classes as `catlip` does, so both can be weighed alike. Means run over the pictures of all processes.

The picture is the joint embedding of `Features.image`, not the tower's output before it is normalised: it is computed once a
step for all objectives, so that labels beside texts cost a linear layer and no second pass. It is a unit vector; times
√D its entries have mean square 1, as those of a normed feature have that a classifier is put on elsewhere. Only its
length is lost, and without it logits would be √D times too small for a head at its usual start and learning rate. With
several labels the head's bias says at first that one class is there, each with 1/C (1708.02002, section 4.1): from ½ on,
the first steps would be spent on learning that most are not.

A row says nothing where the column is null or an empty string, and does not count; an empty list says that none of the
classes is there. A label that is no class is left out and counted (`unknown` is logged, and some are named in a
warning), as labels have long tails and `classes` may be a choice of them; with `single` its row then does not count. Where
not one of the first 1,000 is a class, training stops. Numbers and strings are different labels: 3 is not "3".

Left out: smoothed labels, mixup and CutMix, which supervised recipes for transformers have (2012.12877, table 9).

Shapes: B pictures, L labelled ones, D joint width, C classes.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cutline.errors import ConfigError, DataError
from cutline.objectives import base
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import total, world
from cutline.towers import load_encoder
from cutline.towers.model import Model

Label = int | str
JUDGED, EXAMPLES = 1000, 5  # labels seen before those that are no class are judged, and how many of them are named


class Config(base.ObjectiveConfig):
    """labels: column with a whole number or a string, or a list of them, per row; field: of the structs, where the
    column has lists of structs (scenes: `labels: objects, field: name`). classes: the labels there are, in the recipe or as
    a JSON file with a list. single: whether a picture has one label. positive: weight of a class that is there against
    one that is not, where there are several labels.
    """

    labels: str = Field(min_length=1)
    classes: str | list[Label]
    field: str | None = None
    single: bool = False
    positive: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_or_several(self) -> "Config":
        if self.single and self.positive != 1:
            raise ValueError("with `single` there is nothing for `positive` to weigh: leave one of them out")
        return self


class Objective(base.Objective):
    needs_text = False
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        classes = read_classes(config.classes)
        if config.single and len(classes) < 2:
            raise ConfigError(f"objectives.supervised: with `single` there must be two classes or more, not {classes}.")
        self.place = {label: i for i, label in enumerate(classes)}
        self.head = nn.Linear(load_encoder(model).width, len(classes))
        if not config.single:
            nn.init.constant_(self.head.bias, -math.log(max(len(classes) - 1, 1)))
        self._seen = self._missed = 0  # labels so far, and those of them that are no class
        self._strangers: list[Label] = []

    def columns(self) -> list[str]:
        return [self.config.labels]

    def made_by(self, column: str) -> str:
        return (
            f"Name a column of labels; `cutline pairs create … --field {column}=json:{column}` reads one from the pictures' "
            f"JSON files. Scenes have objectives.supervised: {{labels: objects, field: name}}."
        )

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """The loss. Logged: precision and recall of what is predicted (above ½), or the accuracy; the share of pictures that
        count, and of labels that are no class."""
        picture = features.image()
        with torch.autocast(picture.device.type, enabled=False):
            x = widen(picture)
            logits = self.head(x * x.shape[1] ** 0.5)  # (B, C)
        found = self.labels(batch)
        rows = [i for i, classes in enumerate(found) if classes is not None]
        given = [classes for classes in found if classes is not None]
        loss, logged = (self._single if self.config.single else self._several)(logits[rows], given)
        share = torch.tensor(len(rows) / len(found), device=loss.device)
        self.logged |= logged | {"labelled": share}
        count = torch.tensor(len(rows), device=loss.device)
        return {"labels": loss * world()[1] / total(count)}

    def _several(self, logits: Tensor, given: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        """logits (L, C) and the classes of each picture → the sum of its losses."""
        pairs = [(i, c) for i, classes in enumerate(given) for c in classes]
        there = torch.zeros_like(logits, dtype=torch.bool)
        if pairs:
            there[tuple(torch.tensor(pairs, device=logits.device).T)] = True
        positive = logits.new_tensor(self.config.positive)
        loss = F.binary_cross_entropy_with_logits(logits, there.to(logits.dtype), pos_weight=positive, reduction="sum")
        said = logits.detach() > 0
        right = (said & there).sum()
        return loss, {"precision": right / said.sum().clamp(min=1), "recall": right / there.sum().clamp(min=1)}

    def _single(self, logits: Tensor, given: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        label = torch.tensor([c for classes in given for c in classes], device=logits.device, dtype=torch.long)
        right = (logits.detach().argmax(1) == label).sum()
        return F.cross_entropy(logits, label, reduction="sum"), {"accuracy": right / max(len(given), 1)}

    def labels(self, batch: base.Batch) -> list[list[int] | None]:
        """The classes of each picture; None for one that does not count."""
        values = batch.columns[self.config.labels]
        found: list[list[int] | None] = []
        labels = strangers = 0
        for i, value in enumerate(values.tolist() if isinstance(values, Tensor) else values):
            given = self._given(value)
            if given is None:
                found.append(None)
                continue
            if self.config.single and len(given) > 1:
                key = f" (row {batch.keys[i]!r})" if batch.keys else ""
                raise self._wrong(f"a picture with the labels {given[:3]}{key}, and `single` is set, which takes one")
            known = [self.place[label] for label in given if label in self.place]
            labels, strangers = labels + len(given), strangers + len(given) - len(known)
            self._strangers += [s for s in dict.fromkeys(given) if s not in self.place and s not in self._strangers]
            found.append(None if self.config.single and not known else known)
        self._judge(labels, strangers)
        return found

    def _given(self, value: Any) -> list[Label] | None:
        """The labels in a row's value; None where it says nothing."""
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy's
        many = value if isinstance(value, list | tuple) else [value]
        if self.config.field is not None:
            if not all(v is None or (isinstance(v, dict) and self.config.field in v) for v in many):
                raise self._wrong(f"{str(value)[:200]}, which has no field {self.config.field!r}")
            many = [None if v is None else v[self.config.field] for v in many]
        given = [v for v in many if v is not None and v != ""]
        if not all(type(v) in (int, str) for v in given):
            raise self._wrong(
                f"{str(value)[:200]}: labels are whole numbers, strings or lists of them; where a list holds structs, "
                f"objectives.supervised.field names the one of their fields that is the label"
            )
        return given if given or isinstance(value, list | tuple) else None

    def _judge(self, labels: int, strangers: int) -> None:
        """Say, or refuse, that labels are no classes."""
        self._seen, self._missed = self._seen + labels, self._missed + strangers
        self.logged["unknown"] = torch.tensor(strangers / max(labels, 1), device=self.head.weight.device)
        del self._strangers[EXAMPLES:]
        if self._seen < JUDGED or not self._missed:
            return
        named = ", ".join(repr(s) for s in self._strangers)
        if self._missed == self._seen:
            classes = ", ".join(repr(c) for c in list(self.place)[:EXAMPLES])
            raise self._wrong(
                f"no label that is a class among its first {self._seen:,}: it has {named} and the classes are {classes} …; "
                f"set objectives.supervised.classes to labels that it has"
            )
        self.warning = (
            f"objectives.supervised leaves out labels that are no class, {self._missed / self._seen:.1%} of those so far, for "
            f"example {named}. If they should count, add them to objectives.supervised.classes."
        )

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"objectives.supervised.labels names the column {self.config.labels!r}, which holds {what}.")


def read_classes(classes: str | list[Label]) -> list[Label]:
    """The labels given, or those in a JSON file; raises `ConfigError` or `DataError` for anything but distinct labels."""
    found: Any = classes
    if isinstance(classes, str):
        try:
            found = json.loads(Path(classes).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise DataError(
                f"cannot read the classes of objectives.supervised in {classes!r}: {e}. It is a JSON list of labels."
            ) from e
    where = f"in {classes!r}" if isinstance(classes, str) else "in the recipe"
    if not isinstance(found, list) or not found or not all(type(c) in (int, str) and c != "" for c in found):
        raise ConfigError(f"objectives.supervised.classes {where} must be a list of whole numbers or strings.")
    twice = [label for label, count in Counter(found).items() if count > 1]
    if twice:
        raise ConfigError(f"objectives.supervised.classes {where} has {twice[0]!r} twice.")
    return found
