"""Small tars of small pictures, made on the spot."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def picture(
    seed: int, form: str = "JPEG", size: tuple[int, int] = (24, 16), mode: str = "RGB", **options: Any
) -> bytes:
    """A smooth picture, different for each seed; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def sample(n: int, **changes: bytes | None) -> list[Member]:
    """Members of one webdataset sample; a change replaces a member by extension, None leaves it out."""
    files: Mapping[str, bytes | None] = {
        "jpg": picture(n % 50),
        "txt": f"alt {n}".encode(),
        "json": json.dumps({"captions": [f"caption {n} {c}" for c in "ab"], "score": n / 2, "n": n}).encode(),
    }
    return [(f"{n:06d}.{extension}", data) for extension, data in {**files, **changes}.items() if data is not None]


def write_tar(path: Path, members: list[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
