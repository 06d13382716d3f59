from pathlib import Path

import pytest
from pairs_made import sample, write_tar

from cutline.pairs import Pairs, create


@pytest.fixture
def table(tmp_path: Path) -> Pairs:
    """120 pairs of 24 × 16 pixels with the alt texts "alt 0" … and two captions each."""
    shard = write_tar(tmp_path / "shard.tar", [m for n in range(120) for m in sample(n)])
    create(tmp_path / "table.lance", [shard], captions="json:captions", show=False)
    return Pairs.open(tmp_path / "table.lance")
