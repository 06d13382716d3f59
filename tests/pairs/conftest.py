from pathlib import Path

import pytest
from pairs_made import sample, write_tar

from cutline.pairs import Pairs, create


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three shards of 40 samples; the pattern that names them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(3):
        write_tar(folder / f"{s:05d}.tar", [m for n in range(40 * s, 40 * s + 40) for m in sample(n)])
    return str(folder / "{00000..00002}.tar")


@pytest.fixture
def table(tmp_path: Path, shards: str) -> Pairs:
    """The shards as a table of 120 pairs."""
    create(tmp_path / "table.lance", [shards], captions="json:captions", fields={"score": "json:score"}, show=False)
    return Pairs.open(tmp_path / "table.lance")
