"""Generalised zero-shot splits of segmentation data: which classes training may not see, by their names.

Pixels of unseen classes are `IGNORE` in train and count in val and test, where all classes compete (Xian et al., 1905.09850).
"""

import difflib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutline.errors import ConfigError
from cutline.record import fingerprint
from cutline.scenes import parse_spec
from cutline.scenes.layout import kinds_of
from cutline.scenes.objects import OBJECTS
from cutline.transfer.data import DenseData, Sample, Split
from cutline.transfer.metrics import IGNORE, Confusion

# SPNet's splits (1905.09850), which ZSSeg and most since use: 15/5 of VOC without its background, and 156/15.
VOC = ("pottedplant", "sheep", "sofa", "train", "tvmonitor")
COCO_STUFF = (
    "frisbee", "skateboard", "cardboard", "carrot", "scissors", "suitcase", "giraffe", "cow", "road", "wall-concrete",
    "tree", "grass", "river", "clouds", "playingfield",
)  # fmt: skip
SCENES = tuple(o.name for o in OBJECTS[2::3])  # a third of every family, in worlds of any number of objects
SPLITS = {"scenes": SCENES, "voc": VOC, "cocostuff": COCO_STUFF}


def split_of(data: DenseData, unseen: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The classes that are judged, and those of them that are unseen.

    unseen: names, the name of one of `SPLITS`, or None for the data's own. Not judged are VOC's background and the
    objects that a smaller world of scenes has not. Raises `ConfigError` for data without a split of its own, a name that
    is no class, and where all classes or none are unseen.
    """
    kind = data.spec.partition(":")[0]
    name = unseen if isinstance(unseen, str) else kind if unseen is None else None
    if name is not None and name not in SPLITS:
        raise ConfigError(
            f"unseen: there is no split {name!r} (there are {', '.join(SPLITS)}). Name the classes that training may not "
            "see, such as unseen=[cow,tree]."
        )
    out: set[str] = set()
    if kind == "scenes":
        out = {o.name for o in OBJECTS} - {OBJECTS[k].name for k in kinds_of(parse_spec(data.spec).objects)}
    elif kind == "voc":
        out = {"background"}
    judged = [c for c in data.classes if c not in out]
    wanted = [c for c in SPLITS[name] if c not in out] if name is not None else list(unseen or ())
    for each in wanted:
        if each not in judged:
            near = difflib.get_close_matches(each, judged, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(judged[:8])}, …"
            raise ConfigError(f"unseen: {each!r} is no class of {data.spec}: {hint}")
    if len(set(wanted)) in (0, len(judged)):
        which = "all" if wanted else "none"
        raise ConfigError(f"unseen: {which} of the {len(judged)} classes are unseen; some must be, and some not.")
    return judged, [c for c in judged if c in wanted]


def zero_shot(data: DenseData, unseen: str | Sequence[str] | None) -> tuple[DenseData, Tensor]:
    """`data` of the judged classes alone, with unseen pixels of train as `IGNORE`, and which classes are seen, (K,) bool."""
    judged, hidden = split_of(data, unseen)
    whole = _table(data.classes, judged)
    partly = _table(data.classes, judged, hidden)
    splits = {name: _mapped(part, partly if name == "train" else whole) for name, part in data.splits.items()}
    notes = {**data.notes, "unseen": hidden, "judged": len(judged)}
    contents = fingerprint(data.fingerprint, judged, hidden)
    made = DenseData("segment", data.spec, splits, judged, contents, data.default_pictures, notes=notes)
    return made, torch.tensor([c not in hidden for c in judged])


def _table(classes: Sequence[str], judged: Sequence[str], hidden: Sequence[str] = ()) -> NDArray[np.int16]:
    """From an old class id to a new one or `IGNORE`; the last entry is that of `IGNORE`, -1."""
    place = {name: i for i, name in enumerate(judged) if name not in hidden}
    return np.array([*(place.get(name, IGNORE) for name in classes), IGNORE], np.int16)


def _mapped(part: Split, table: NDArray[np.int16]) -> Split:
    def read(row: int) -> Sample:
        sample = part.read(row)
        return Sample(sample.key, sample.image, table[sample.target])

    return Split(part.name, part.keys, read, size=part.size)


def scores(confusion: Confusion, seen: Tensor) -> dict[str, float]:
    """seen_miou and unseen_miou, the means of IoU over classes in truth or prediction, and their harmonic mean, hiou:
    2 · seen · unseen / (seen + unseen). NaN where either has no class to judge."""
    iou = confusion.iou()
    known, other = iou[seen].nanmean().item(), iou[~seen].nanmean().item()
    return {
        "hiou": 2 * known * other / (known + other) if known + other else 0.0,
        "seen_miou": known,
        "unseen_miou": other,
    }
