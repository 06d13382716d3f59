"""Embeddings of a whole source: pictures as open_clip tests them, and every text of the chosen columns."""

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


@torch.no_grad()
def embed_pairs(
    model: towers.Model, source: Any, columns: Sequence[str], batch: int = 64, max_texts: int = 5
) -> Embedded:
    """Embed every pair of `source` with all its texts (at most `max_texts` a picture) from the text `columns`.

    Pictures are resized and centre-cropped by the tower's own test transform (open_clip's). Pictures that cannot be
    read and pairs without a text are left out and counted; raises `DataError` above a share of 10 % unreadable ones.
    """
    missing = [c for c in columns if c not in source.columns]
    if missing:
        raise DataError(f"no column {missing[0]!r} in the data; there are: {', '.join(source.columns)}.")
    device = next(model.parameters()).device
    transform, tokenizer = test_transform(model), towers.Tokenizer(model)
    out = Embedded(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.long))
    images, texts, owners, n = [], [], [], 0
    training = model.training
    model.eval()
    with ThreadPoolExecutor(2) as pool, progress("embed", len(source), "pairs") as tick:
        for start in range(0, len(source), batch):
            rows = source.read(range(start, min(start + batch, len(source))), ["image", *columns])
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
    bad = sum(v for k, v in out.skipped.items() if k != "no text")
    if not images and not bad:
        raise DataError(f"none of {len(source)} pairs has a text in {', '.join(columns)}: look at columns and where.")
    if bad > MAX_BAD * len(source) or not images:
        raise DataError(f"{bad} of {len(source)} pictures cannot be read ({out.skipped}); run `cutline pairs check`.")
    out.image, out.text, out.owners = torch.cat(images), torch.cat(texts), torch.tensor(owners)
    return out


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
