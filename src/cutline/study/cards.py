"""What the encoders of a study read: a few training pictures with the texts of every arm side by side."""

import base64
import io
import re
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from cutline.pairs.decode import BadPicture, decode
from cutline.study.plan import Plan
from cutline.train.recipe import Recipe
from cutline.train.stream import Source, open_source

TEXTS = 3  # of one column, at the most
NAMES = {"alt": "alt text", "caption_ours": "our caption", "caption_fused": "alt text and ours, fused"}


def cards(plan: Plan, out: Path, count: int = 8) -> list[dict[str, Any]]:
    """The first pictures, each with its texts by the arms' columns; none that our captioner has learnt from.

    Scenes are drawn larger than the encoders saw them.
    """
    recipes = [plan.recipe(arm, plan.seeds[0], out) for arm in plan.arms]
    data = recipes[0].data
    source = open_source(_larger(data.pairs), data.where)
    whole = (data.pairs, data.where) == (str(out / "pairs.lance"), None)  # whose rows are those of the scenes
    drawn = open_source(_larger(plan.recaption.scenes)) if plan.recaption is not None and whole else source
    columns = _columns(plan, recipes, source)
    shown = []
    for row in islice(_rows(source, columns), count):
        picture = _picture(drawn.read([row["row"]], ["image"])[0]["image"])
        if picture is not None:
            texts = [{"name": NAMES.get(c, c.replace("_", " ")), "lines": _lines(row[c])} for c in columns]
            shown.append({"image": picture, "texts": texts})
    return shown


def _larger(pairs: str) -> str:
    return re.sub(r"(scenes:.*size=)\d+", r"\g<1>224", pairs)


def _columns(plan: Plan, recipes: list[Recipe], source: Source) -> list[str]:
    """The text columns that the arms read, the alt text first and our own captions before those we compare them with."""
    read = [c for arm, r in zip(plan.arms, recipes) if plan.arms[arm] is not None for c in r.data.text.columns]
    first = [c for c in NAMES if c in read]
    return [c for c in dict.fromkeys([*first, *read]) if c in source.columns]


def _rows(source: Source, columns: list[str]) -> Any:
    """Rows in order, without those a captioner has learnt from."""
    learnt = "caption_human" if "caption_human" in source.columns else None
    for row in range(len(source)):
        values = source.read([row], [*columns, *([learnt] if learnt else [])])[0]
        if learnt is None or values[learnt] is None:
            yield values | {"row": row}


def _lines(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or [])[:TEXTS]


def _picture(image: Any) -> str | None:
    """A data URL of a small JPEG; None for a picture that cannot be read."""
    try:
        pixels = decode(image, min_size=224) if isinstance(image, bytes) else image
    except BadPicture:
        return None
    if pixels is None:
        return None
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((320, 320))
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
