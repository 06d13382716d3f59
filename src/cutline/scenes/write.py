"""`cutline scenes`: scenes as a table of pairs, and their dense labels as a `folder:` data set.

Layout of the labels: classes.txt, and {train,val}/{images,masks,depth}/KEY with pictures as JPEG, masks as PNG of class
ids, depth as 16-bit PNG in millimetres (0 = no reading). Every fifth scene is in val.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.errors import DataError
from cutline.progress import progress
from cutline.record import write_atomic
from cutline.scenes.objects import CLASSES
from cutline.scenes.source import SceneConfig, Scenes

QUALITY = 90  # of the JPEGs
VAL_EVERY = 5  # one scene of this many goes into val
CHUNK = 64


def write_pairs(config: SceneConfig, out: str | Path, labels: str | Path | None = None) -> None:
    """Write the scenes of `config` to the table `out`, pictures inline, with `alt`, `alt_kind` and `captions`.

    labels: also write the dense labels into this folder, which must not hold any yet. Raises `DataError`.
    """
    from cutline.pairs import Provenance, create_from_rows

    if labels is not None and (Path(labels) / "classes.txt").exists():
        raise DataError(f"{str(labels)!r} holds labels already. Choose another folder, or delete it first.")
    provenance = Provenance(how="scenes", settings=config.model_dump(mode="json"))
    create_from_rows(out, table_rows(Scenes(config), None if labels is None else Path(labels)), provenance=provenance)
    if labels is not None:
        write_atomic(Path(labels) / "classes.txt", ("\n".join(CLASSES) + "\n").encode())


def table_rows(scenes: Scenes, labels: Path | None = None) -> Iterator[dict[str, Any]]:
    """Rows for a table of pairs, the pictures encoded as JPEG; writes each scene's labels on the way if asked to."""
    texts = ["key", "image", "width", "height", "alt", "alt_kind", "captions"]
    columns = texts + (["semantic", "depth"] if labels is not None else [])
    with progress("scenes", len(scenes), "scenes") as tick:
        for first in range(0, len(scenes), CHUNK):
            rows = range(first, min(first + CHUNK, len(scenes)))
            for index, row in zip(rows, scenes.read(rows, columns), strict=True):
                row["image"] = _encode(row["image"], "JPEG", quality=QUALITY)
                if labels is not None:
                    _write_labels(labels / ("val" if index % VAL_EVERY == VAL_EVERY - 1 else "train"), row)
                yield {name: row[name] for name in texts}
                tick()


def _write_labels(split: Path, row: dict[str, Any]) -> None:
    millimetres = np.round(row["depth"] * 1000).astype(np.uint16)
    files = {
        f"images/{row['key']}.jpg": row["image"],
        f"masks/{row['key']}.png": _encode(row["semantic"], "PNG"),
        f"depth/{row['key']}.png": _encode(millimetres, "PNG"),
    }
    for name, data in files.items():
        path = split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _encode(pixels: NDArray[Any], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()
