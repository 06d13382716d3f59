"""Embeddings of a whole source: pictures as open_clip tests them, and every text of the chosen columns."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutline import towers
from cutline.errors import DataError
from cutline.objectives.gather import of_all, own_share, together, world
from cutline.progress import progress
from cutline.towers.pictures import test_transform

MAX_BAD = 0.1  # share of pictures that may be unreadable before a score would mislead


@dataclass
class Embedded:
    """image (n, D) and text (m, D), L2-normalised float32; owners (m,): the picture of each text.

    rows: of the source, of each picture; texts: as they were read; skipped: reason → count of pictures left out; truncated: texts cut at the tower's context.
    """

    image: Tensor
    text: Tensor
    owners: Tensor
    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0


def embed_pairs(
    model: towers.Model, source: Any, columns: Sequence[str], batch: int = 64, max_texts: int = 5
) -> Embedded:
    """Embed every pair of `source` with all its texts (at most `max_texts` a picture) from the text `columns`; each process its
    share, and all get all.

    Pictures are resized and centre-cropped by the tower's own test transform (open_clip's). Pictures that cannot be
    read and pairs without a text are left out and counted; raises `DataError` above a share of 10 % unreadable ones.
    """
    missing = [c for c in columns if c not in source.columns]
    if missing:
        raise DataError(f"no column {missing[0]!r} in the data; there are: {', '.join(source.columns)}.")
    with together():
        mine = _embed(model, source, columns, batch, max_texts)
    out = _joined(of_all(mine))
    bad = sum(v for k, v in out.skipped.items() if k != "no text")
    if not len(out.image) and not bad:
        raise DataError(f"none of {len(source)} pairs has a text in {', '.join(columns)}: look at columns and where.")
    if bad > MAX_BAD * len(source) or not len(out.image):
        raise DataError(f"{bad} of {len(source)} pictures cannot be read ({out.skipped}); run `cutline pairs check`.")
    return out


@torch.no_grad()
def _embed(model: towers.Model, source: Any, columns: Sequence[str], batch: int, max_texts: int) -> Embedded:
    """This process's share."""
    device = next(model.parameters()).device
    transform, tokenizer = test_transform(model), towers.Tokenizer(model)
    empty = torch.empty(0)
    out = Embedded(empty, empty, torch.empty(0, dtype=torch.long))
    images, texts, owners, n = [], [], [], 0
    share, training = own_share(len(source), batch), model.training
    model.eval()
    with ThreadPoolExecutor(2) as pool, progress("embed", len(share), "pairs", world()[0] == 0) as tick:
        for start in share[::batch]:
            rows = source.read(share[start - share.start : start - share.start + batch], ["image", *columns])
            pictures = list(pool.map(lambda row: _picture(row, transform), rows))
            kept: list[Tensor] = []
            captions: list[str] = []
            for number, (row, picture) in enumerate(zip(rows, pictures, strict=True), start):
                found = _texts(row, columns)[:max_texts]
                reason = picture if isinstance(picture, str) else "" if found else "no text"
                if isinstance(picture, str) or reason:
                    out.skipped[reason] = out.skipped.get(reason, 0) + 1
                    continue
                owners += [n + len(kept)] * len(found)
                kept.append(picture)
                captions += found
                out.rows.append(number)
            tick(len(rows))
            if not kept:
                continue
            n += len(kept)
            out.texts += captions
            tokens = tokenizer(captions)
            out.truncated += tokenizer.truncated(captions, tokens)
            images.append(model.encode_image(torch.stack(kept).to(device), normalize=True).float().cpu())
            texts.append(model.encode_text(tokenizer.trimmed(tokens).to(device), normalize=True).float().cpu())
    model.train(training)
    if images:
        out.image, out.text, out.owners = torch.cat(images), torch.cat(texts), torch.tensor(owners)
    return out


def _joined(parts: Sequence[Embedded]) -> Embedded:
    """All processes' embeddings as those of one."""
    some = [part for part in parts if len(part.image)] or parts[:1]
    before = [sum(len(p.image) for p in some[:i]) for i in range(len(some))]
    skipped = Counter[str]()
    for part in parts:
        skipped.update(part.skipped)
    return Embedded(
        torch.cat([p.image for p in some]),
        torch.cat([p.text for p in some]),
        torch.cat([p.owners + n for p, n in zip(some, before, strict=True)]),
        [row for p in parts for row in p.rows],
        [text for p in parts for text in p.texts],
        dict(skipped),
        sum(p.truncated for p in parts),
    )


def _picture(row: dict[str, Any], transform: Any) -> Tensor | str:
    """The transformed picture, or why there is none."""
    from PIL import Image

    from cutline.pairs.decode import BadPicture, decode

    data = row["image"]
    if data is None:
        return str(row.get("error", "unreadable"))
    try:
        pixels = decode(data) if isinstance(data, bytes) else data
    except BadPicture as e:
        return e.reason
    tensor: Tensor = transform(Image.fromarray(pixels))
    return tensor


def _texts(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for column in columns:
        value = row[column]
        found += [value] if isinstance(value, str) else list(value or [])
    return [t for t in found if t.strip()]


def read_picture(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3), upright. Raises `CutlineError` for a file that is not there or is no picture."""
    from cutline.pairs.decode import decode

    try:
        return decode(path.read_bytes())
    except OSError as e:
        raise DataError(f"cannot read the picture {str(path)!r}: {e.strerror}. Check the path.") from e
