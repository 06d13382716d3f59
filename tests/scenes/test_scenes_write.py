"""Scenes written as a table of pairs and as a folder of labels hold what `Scenes` draws."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cutline.errors import DataError
from cutline.scenes import CLASSES, SceneConfig, Scenes
from cutline.scenes.write import write_pairs

CONFIG = SceneConfig(n=10, size=64, seed=4, mix="web")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_pairs(CONFIG, folder / "scenes.lance", folder / "labels")
    return folder


def test_the_table_holds_pictures_and_texts(written: Path) -> None:
    from cutline.pairs import Pairs

    pairs = Pairs.open(str(written / "scenes.lance"))
    columns = ["key", "image", "alt", "captions"]
    assert len(pairs) == 10
    for stored, drawn in zip(pairs.read(range(10), columns), Scenes(CONFIG).read(range(10), columns), strict=True):
        assert stored["key"] == drawn["key"]
        assert (stored["alt"] or "") == drawn["alt"]
        assert stored["captions"] == drawn["captions"]
        picture = np.asarray(Image.open(io.BytesIO(stored["image"])))
        assert np.abs(picture.astype(int) - drawn["image"]).mean() < 6


def test_the_labels_are_a_folder_data_set(written: Path) -> None:
    labels = written / "labels"
    assert tuple((labels / "classes.txt").read_text().splitlines()) == CLASSES
    assert [len(list((labels / s / "images").iterdir())) for s in ("train", "val")] == [8, 2]
    for index, row in enumerate(Scenes(CONFIG).read(range(10), ["key", "semantic", "depth"])):
        split = labels / ("val" if index % 5 == 4 else "train")
        assert (split / "images" / f"{row['key']}.jpg").exists()
        assert np.array_equal(Image.open(split / "masks" / f"{row['key']}.png"), row["semantic"])
        millimetres = np.asarray(Image.open(split / "depth" / f"{row['key']}.png"))
        np.testing.assert_allclose(millimetres / 1000, row["depth"], atol=0.0006)


def test_labels_are_not_written_over(written: Path) -> None:
    with pytest.raises(DataError, match="holds labels already"):
        write_pairs(CONFIG, written / "other.lance", written / "labels")
    assert not (written / "other.lance").exists()
