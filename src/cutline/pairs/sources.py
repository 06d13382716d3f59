"""SOURCE as the user writes it → feeds of samples."""

import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from cutline.errors import DataError
from cutline.pairs.coco import CocoFeed
from cutline.pairs.files import TABLES, FolderFeed, TableFeed, names_pictures
from cutline.pairs.samples import Feed
from cutline.pairs.tars import TarFeed

KINDS = (
    "tar shards ('shards/{00000..00003}.tar', 'shards/*.tar'), a folder of pictures, a .csv, .tsv, .jsonl or .parquet "
    "file, coco:ANNOTATIONS.json[,IMAGES_DIR], or hf:NAME[:SPLIT]"
)


def expand(pattern: str) -> list[str]:
    """`a{1..3}{x,y}` → every combination, in order; zero-padded ranges keep their width."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    inner = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        low, high = span.groups()
        width = len(low) if low.startswith("0") or len(low) == len(high) else 0
        choices = [f"{i:0{width}d}" for i in range(int(low), int(high) + 1)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand(head + c + tail) for c in choices))


def open_feeds(sources: Sequence[str | Path], image: str | None = None) -> list[Feed]:
    """One feed per source, the tar shards of all patterns together first. Raises `DataError` for what is not there.

    image: the column of a table that holds the pictures' paths or bytes, where its name does not tell.
    """
    if not sources:
        raise DataError(f"no source was given. A source is {KINDS}.")
    feeds: list[Feed] = []
    shards: list[Path] = []
    for source in map(str, sources):
        if re.search(r"\.tar(\.\w+)?$|\.tgz$", source):
            shards += matching_files(source)
            continue
        feeds += _open(source, image)
    if shards:
        feeds.insert(0, TarFeed(shards))
    return feeds


def _open(source: str, image: str | None) -> list[Feed]:
    if source.startswith("coco:"):
        return [CocoFeed(source.removeprefix("coco:"))]
    if source.startswith("hf:"):
        from cutline.pairs.huggingface import HuggingFaceFeed

        return [HuggingFaceFeed(source.removeprefix("hf:"), image)]
    if source.endswith(TABLES):
        return [TableFeed(path, None, image) for path in matching_files(source)]
    folder = Path(source)
    if folder.is_dir():
        tables = sorted(p for p in folder.iterdir() if p.suffix in TABLES and names_pictures(p, image))
        if len(tables) > 1:
            raise DataError(
                f"the folder {source!r} holds several tables of pictures: {', '.join(p.name for p in tables)}. "
                "Name the one you mean as the source."
            )
        return [TableFeed(tables[0], folder, image)] if tables else [FolderFeed(folder)]
    if folder.exists() or "://" in source:
        raise DataError(f"cannot tell what kind of source {source!r} is. A source is {KINDS}.")
    raise DataError(f"no such file or folder: {source!r}. A source is {KINDS}.")


def matching_files(pattern: str) -> list[Path]:
    """The files a brace or glob pattern names, each existing."""
    if "://" in pattern:
        raise DataError(f"{pattern!r} is remote: `create` reads local files only. Mount or copy the shards first.")
    found: list[Path] = []
    missing: list[str] = []
    for name in expand(pattern):
        if Path(name).is_file():
            found.append(Path(name))
        elif glob.has_magic(name):
            hits = sorted(glob.glob(name))
            found += [Path(h) for h in hits]
            missing += [] if hits else [name]
        else:
            missing.append(name)
    if not found and not missing:
        raise DataError(f"{pattern!r} names no file: the range in it must go up, as in {{00000..00003}}.")
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise DataError(
            f"no such file: {', '.join(missing[:3])}{more} (from {pattern!r}; {len(found):,} others are there). "
            "Check the path and quote the pattern, or name what there is with a glob such as '*.tar'."
        )
    return found
