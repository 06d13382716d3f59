"""Predictions of files: what is written is what the model predicts, and readable where it is meant to be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_made import outspoken
from PIL import Image
from typer.testing import CliRunner

from cutline import transfer
from cutline.cli import app
from cutline.errors import ConfigError, DataError
from cutline.transfer import masks
from cutline.transfer.classify import Classifier, ClassifyConfig
from cutline.transfer.data import open_data
from cutline.transfer.depth import DepthConfig, DepthEstimator
from cutline.transfer.detect import DetectConfig
from cutline.transfer.detector import Detector
from cutline.transfer.predict import predict
from cutline.transfer.segment import SegmentConfig, Segmenter
from cutline.transfer.store import save
from cutline.transfer.targets import read_depth

NAMES = ["ground", "red", "blue"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of different sizes in a folder."""
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(40, 56), (33, 30)]):
        image = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def segmenter(encoder: Any, tmp_path: Path) -> Path:
    save(Segmenter(encoder, SegmentConfig(crop=(32, 32), channels=64), NAMES).eval(), tmp_path / "run/model")
    return tmp_path / "run"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_three_lines_of_python(segmenter: Path, photos: Path) -> None:
    model = transfer.load(segmenter)
    (found,) = model.predict([pixels(photos / "0.png")])
    assert found.shape == (40, 56)


def test_class_ids_are_masks_of_a_folder_data_set(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    report = predict(segmenter, [photos])
    assert (len(report.written), report.skipped, report.folder) == (2, [], segmenter / "predicted")
    model, data = transfer.load(segmenter), tmp_path / "data"
    shutil.copytree(photos, data / "train/images")
    (data / "train/masks").mkdir()
    for i in (0, 1):
        ids = report.folder / f"{i}.ids.png"
        assert pixels(ids).dtype == np.uint8
        shutil.copy(ids, data / "train/masks" / f"{i}.png")
        assert pixels(report.folder / f"{i}.png").shape[1] >= 480, "a drawing to look at"
    shutil.copytree(data / "train", data / "val")
    shutil.copy(report.folder / "classes.txt", data)
    opened = open_data(f"folder:{data}", "segment")
    assert opened.classes == NAMES
    for i in (0, 1):
        sample = opened.split("train").read(i)
        assert np.array_equal(sample.target, model.predict([sample.image])[0])


def test_many_classes_need_sixteen_bits(encoder: Any, photos: Path, tmp_path: Path) -> None:
    many = [f"c{i}" for i in range(300)]
    save(Segmenter(encoder, SegmentConfig(crop=(32, 32), head="linear"), many).eval(), tmp_path / "run")
    predict(tmp_path / "run", [photos / "0.png"], tmp_path / "out")
    expected = transfer.load(tmp_path / "run").predict([pixels(photos / "0.png")])[0]
    assert expected.max() > 255
    assert np.array_equal(pixels(tmp_path / "out/0.ids.png"), expected)


@pytest.mark.parametrize(("top", "ending", "apart"), [(5.0, "png", 5.1e-4), (80.0, "npy", 0.0)])
def test_depth_reads_back_in_metres(
    encoder: Any, photos: Path, tmp_path: Path, top: float, ending: str, apart: float
) -> None:
    config = DepthConfig(crop=(32, 32), channels=32, deconvolutions=1, max_depth=top)
    save(DepthEstimator(encoder, config).eval(), tmp_path / "run")
    predict(tmp_path / "run", [photos / "1.png"], tmp_path / "out")
    expected = transfer.load(tmp_path / "run").predict([pixels(photos / "1.png")])[0]
    found = read_depth(tmp_path / f"out/1.depth.{ending}", None)
    assert np.abs(found - expected).max() <= apart
    assert found.min() > 0


def test_objects_as_json_with_run_lengths(make_encoder: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": 64, "channels": 16, "hidden": 32, "rois": 16, "anchors": 4.0, "scale": (1, 1)}
    save(outspoken(Detector(make_encoder(), DetectConfig(**options), ["a", "b"], True)).eval(), tmp_path / "run")
    predict(tmp_path / "run", [photos / "0.png"], tmp_path / "out", ["min_score=0.3", "detections=4"])
    content = json.loads((tmp_path / "out/0.json").read_text())
    expected = transfer.load(tmp_path / "run").predict([pixels(photos / "0.png")])[0]
    assert len(content["scores"]) == 4
    assert np.allclose(content["boxes"], expected["boxes"][:4], atol=0.01)
    assert content["labels"] == ["ab"[k] for k in expected["labels"][:4]]
    for packed, mask in zip(content["masks"], expected["masks"]):
        assert np.array_equal(masks.decode(packed, 40, 56), mask)


def test_the_five_best_classes(encoder: Any, photos: Path, tmp_path: Path) -> None:
    names = list("abcdefg")
    save(Classifier(encoder, ClassifyConfig(size=32, short=32), names).eval(), tmp_path / "run")
    predict(tmp_path / "run", [photos / "1.png"], tmp_path / "out")
    content = json.loads((tmp_path / "out/1.json").read_text())
    shares = transfer.load(tmp_path / "run").probabilities([pixels(photos / "1.png")])[0]
    assert content["classes"] == [names[i] for i in np.argsort(-shares)[:5]]
    assert content["shares"] == pytest.approx(sorted(shares, reverse=True)[:5], abs=1e-4)


def test_a_broken_picture_is_told_and_the_rest_goes_on(
    segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "00.jpg").write_bytes(b"no picture")
    report = predict(segmenter, [photos], tmp_path / "out")
    assert [p.name for p in report.written] == ["0.png", "1.png"]
    assert "1 of 3 pictures skipped:\n  " + str(photos / "00.jpg") in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 1 pictures skipped"):
        predict(segmenter, [photos / "00.jpg"], tmp_path / "out")


def test_pictures_are_turned_upright(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    with Image.open(photos / "0.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90°
        image.save(photos / "turned.jpg", exif=exif)
    predict(segmenter, [photos / "turned.jpg"], tmp_path / "out")
    assert pixels(tmp_path / "out/turned.ids.png").shape == (56, 40)


def test_overrides_change_how_the_model_looks_and_nothing_else(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    image = pixels(photos / "0.png")
    model = transfer.load(segmenter)
    for changes in ({"test_flip": True}, {"test": "slide", "crop": (24, 24), "stride": 8}):
        given = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in changes.items()]
        predict(segmenter, [photos / "0.png"], tmp_path / "out", given)
        model.config = SegmentConfig(channels=64, **{"crop": (32, 32), **changes})
        assert np.array_equal(pixels(tmp_path / "out/0.ids.png"), model.predict([image])[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", "'steps' is not an option of a trained model of segment: test, crop"),
        ("stride=8", "test=whole has no windows: leave stride out"),
        ("test=slid", "test .override 'test=slid'."),
    ],
)
def test_overrides_that_would_be_ignored_are_refused(
    segmenter: Path, photos: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(segmenter, [photos], overrides=[override])


def test_what_is_no_model_of_the_task_is_told_what_to_do(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a model of segment: cutline transfer segment --encoder"):
        predict(segmenter, [photos], task="depth")
    with pytest.raises(DataError, match="Train one first: cutline transfer depth --encoder scratch:vit-tiny-64 --data"):
        predict("scratch:vit-tiny-64", [photos], task="depth")
    segmenter.rename(tmp_path / "segment-camvid")
    with pytest.raises(DataError, match="It holds .*segment-camvid: name one"):
        predict(tmp_path, [photos], task="segment")


def test_nothing_is_written_over(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0\.png.*Choose another --out"):
        predict(segmenter, [photos], photos)
    (tmp_path / "more").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "more/0.png")
    with pytest.raises(DataError, match="would take the place"):
        predict(segmenter, [photos / "0.png", tmp_path / "more"], tmp_path / "out")
    shutil.copy(photos / "0.png", photos / "0.bmp")  # another picture of the same stem
    assert len(predict(segmenter, [photos], tmp_path / "out").written) == 3
    assert (tmp_path / "out/0.bmp.ids.png").is_file()
    assert (tmp_path / "out/0.png.ids.png").is_file()


def test_the_command_needs_data_or_pictures(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    command = ["transfer", "segment", "--encoder", str(segmenter)]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ConfigError)
    assert "--data KIND:PATH to train" in str(done.exception)
    pictures = ["--predict", str(photos / "0.png"), "--predict", str(photos / "1.png")]
    done = CliRunner().invoke(app, [*command, *pictures, "--out", str(tmp_path / "out"), "test_flip=true"])
    assert done.exit_code == 0, done.output
    assert "Pictures predicted: 2" in done.output
    assert (tmp_path / "out/1.ids.png").is_file()
