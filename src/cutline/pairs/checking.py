"""`check`: decode every picture and look at every text, and report what is wrong by reason."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from PIL import Image

from cutline.pairs.decode import BadPicture, decode
from cutline.pairs.headers import kind_of
from cutline.pairs.report import CheckReport, Count
from cutline.pairs.table import Pairs
from cutline.progress import progress

BATCH = 256
WORDS = 77  # more words than CLIP's context has tokens: the end is certainly cut off
EXTENSIONS = {"jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "tif": "tiff", "tiff": "tiff"}
EXTENSIONS |= {name: name for name in ("png", "webp", "gif", "bmp")}
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"


def check(pairs: Pairs, threads: int = 4, show: bool = True) -> CheckReport:
    """Decode all pictures of `pairs` in `threads` threads, and look at all text columns.

    `bad`: pictures that cannot be read or decoded (missing shard, empty, truncated, bomb, broken, not a picture).
    `notes`: pictures that are converted on the way (CMYK, 16 bits, animated) or named after another format.
    `captions`: for each text column the rows with no text, more than 77 words, or control characters.
    """
    report, begun = CheckReport(path=pairs.path), time.monotonic()
    texts = [f.name for f in pairs.schema if f.name != "key" and _is_text(f.type)]
    starts = iter(range(0, len(pairs), BATCH))
    with ThreadPoolExecutor(threads) as pool, progress("pairs check", len(pairs), "pairs", show) as tick:
        work = [pool.submit(_look, pairs, start, texts) for start in islice(starts, 2 * threads)]
        while work:  # results in order, so that the examples are the first ones
            found = work.pop(0).result()
            work += [pool.submit(_look, pairs, start, texts) for start in islice(starts, 1)]
            for kind, reason, key in found:
                getattr(report, kind).setdefault(reason, Count()).add(key)
            tick(min(BATCH, len(pairs) - report.pictures))
            report.pictures = min(report.pictures + BATCH, len(pairs))
    report.seconds = time.monotonic() - begun
    return report


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or (pa.types.is_list(kind) and pa.types.is_string(kind.value_type)))


def _look(pairs: Pairs, start: int, texts: list[str]) -> list[tuple[str, str, str]]:
    """(`bad`, `notes` or `captions`, reason, key) of what is wrong with a batch of rows."""
    rows = np.arange(start, min(start + BATCH, len(pairs)))
    found = []
    names = pairs.picture_names(rows)
    for row, name in zip(pairs.read(rows.tolist(), ["key", "image"]), names):
        key, data = row["key"], row["image"]
        if data is None:
            missing = "No such file" in row.get("error", "")
            found.append(
                ("bad", "file or shard is missing" if missing else "cannot be read", f"{key}: {row.get('error')}")
            )
            continue
        try:
            decode(data)
        except BadPicture as e:
            found.append(("bad", e.reason, key))
        else:
            found += [("notes", note, key) for note in _notes(data, name)]
    keys = pairs.take(rows, ["key"])["key"].to_pylist()
    for name in texts:
        found += [("captions", f"{name}: {what}", keys[i]) for i, what in _text(pairs.take(rows, [name])[name])]
    return found


def _notes(data: bytes, name: str | None) -> list[str]:
    kind, notes = kind_of(data), []
    named = EXTENSIONS.get((name or "").rpartition(".")[2].lower())
    if named and kind and named != kind:
        notes.append(f"named as {named}, but {kind}: decoded by its content")
    if kind == "jpeg":
        try:
            mode = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        except ValueError:  # a kind of subsampling that only Pillow decodes
            mode = ""
        if mode in ("CMYK", "YCCK"):
            notes.append("CMYK: converted to RGB")
        return notes
    image = Image.open(io.BytesIO(data))
    if image.mode == "CMYK":
        notes.append("CMYK: converted to RGB")
    if image.mode.startswith("I") or (kind == "png" and data[24] == 16):
        notes.append("16 bits a channel: scaled to 8")
    if getattr(image, "is_animated", False):
        notes.append("animated: first frame taken")
    return notes


def _text(column: pa.ChunkedArray) -> list[tuple[int, str]]:
    """(row, what is wrong) for a batch of a text column."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    found = [(int(i), "missing") for i in np.flatnonzero(~np.asarray(array.is_valid()))]
    rows = np.arange(len(array))
    if pa.types.is_list(array.type):
        rows, array = np.asarray(pc.list_parent_indices(array)), array.flatten()
    checks = {
        "empty": pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(array)), 0),
        f"more than {WORDS} words": pc.greater(pc.count_substring_regex(array, r"\S+"), WORDS),
        "control characters": pc.match_substring_regex(array, CONTROL),
    }
    for what, mask in checks.items():
        hits = np.unique(rows[np.asarray(mask.fill_null(False))])
        found += [(int(i), what) for i in hits]
    return found
