"""Names of a data set's classes as one would say them, for prompts: `fence_post`, `SignSymbol` and `wall-other-merged`.

Data sets of objects have a class "background", which no word means. As in SCLIP (2312.01597, its class lists), it gets the
names of what is commonly behind objects, and a person those of people in clothes; where the data set has such classes of its
own (PASCAL Context's 60), "background" stays.
"""

import re
from collections.abc import Sequence

from cutline.zeroshot.prompts import Names, unique

BEHIND = "background"
BACKGROUND = (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building", "cloud",
    "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail", "fence",
)  # fmt: skip
STUFF = {"sky", "wall", "grass", "road"}  # any of them says that the data set names its background itself
PERSON = ("person", *(f"person in {cloth}" for cloth in ("shirt", "jeans", "dress", "sweater", "skirt", "jacket")))
SAID = {
    "diningtable": ("dining table",), "pottedplant": ("potted plant",), "playingfield": ("playing field",),
    "tvmonitor": ("television monitor", "tv monitor", "monitor", "television", "screen"),
}  # fmt: skip
SUFFIX = re.compile(r"(-other|-stuff|-merged)+$")
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def readable(classes: Sequence[str]) -> Names:
    """Of each class its synonyms. Raises `ConfigError` where two come to one name."""
    names = [list(SAID.get(name, (_said(name),))) for name in classes]
    flat = {name for synonyms in names for name in synonyms}
    objects = BEHIND in flat and not flat & STUFF
    change = {BEHIND: [name for name in BACKGROUND if name not in flat]} if objects else {}
    if objects or "pottedplant" in classes:  # VOC's 20 have no background, and SCLIP's list of them people in clothes
        change["person"] = list(PERSON)
    return unique([change.get(synonyms[0], synonyms) for synonyms in names])


def _said(name: str) -> str:
    return " ".join(CAMEL.sub(" ", SUFFIX.sub("", name)).replace("_", " ").replace("-", " ").split())
