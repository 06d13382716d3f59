"""Transferred models as programs: what they give for uint8 pictures is what the model predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from dense_made import outspoken
from typer.testing import CliRunner

from cutline.cli import app
from cutline.errors import CutlineError
from cutline.transfer.classify import Classifier, ClassifyConfig
from cutline.transfer.depth import DepthConfig, DepthEstimator
from cutline.transfer.detect import DetectConfig
from cutline.transfer.detector import Detector
from cutline.transfer.export import export
from cutline.transfer.segment import SegmentConfig, Segmenter
from cutline.transfer.store import save


def pictures(n: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def written(model: Any, folder: Path, to: str, size: Any = None) -> Any:
    """The exported program of a model, as a function of uint8 pictures (B, 3, H, W)."""
    save(model.eval(), folder / "run/model")
    export(folder / "run", folder / "out", to, size)
    if to == "torch_export":
        return torch.export.load(folder / "out/model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "out/model.onnx")
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"pictures": x.numpy()})]


def test_segmentation_with_the_crop_as_the_size(encoder: Any, tmp_path: Path) -> None:
    model = Segmenter(encoder, SegmentConfig(crop=(40, 56), channels=64, frozen=True), ["a", "b", "c"])
    program, images = written(model, tmp_path, "torch_export"), pictures(5, 40, 56)
    (logits,) = program(batch(images))
    assert np.array_equal(logits.argmax(1), np.stack(model.predict(images)))
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert (said["task"], said["classes"], said["size"]) == ("segment", ["a", "b", "c"], [40, 56])


def test_depth_at_a_size_of_ones_own(encoder: Any, tmp_path: Path) -> None:
    model = DepthEstimator(encoder, DepthConfig(crop=(32, 32), channels=32, deconvolutions=1, max_depth=3))
    program, images = written(model, tmp_path, "onnx", (30, 44)), pictures(3, 30, 44)  # no multiple of the patch
    (metres,) = program(batch(images))
    np.testing.assert_allclose(metres, np.stack(model.predict(images)), rtol=1e-4)


@pytest.mark.parametrize("head", ["attentive", "knn"])
def test_classification(encoder: Any, tmp_path: Path, head: Any) -> None:
    config = ClassifyConfig(size=32, short=32, head=head, frozen=True)
    model = Classifier(encoder, config, ["a", "b", "c"], pictures=30)
    model.labels = 30
    if head == "knn":
        g = torch.Generator().manual_seed(0)
        model.head.fill(torch.randn(30, encoder.width, generator=g), torch.arange(30) % 2)  # none of class c
    program, images = written(model, tmp_path, "torch_export"), pictures(300, 32, 32)  # more than knn's chunk
    (logits,) = program(batch(images))
    np.testing.assert_allclose(logits.softmax(1), model.probabilities(images), atol=1e-4)


OPTIONS: dict[str, Any] = {
    "size": 64, "channels": 16, "hidden": 32, "anchors": 4.0, "scale": (1, 1), "min_score": 0.37, "detections": 20,
}  # fmt: skip


@pytest.mark.parametrize("head", ["rcnn", "cascade"])
def test_detection_of_one_picture_with_any_number_of_proposals(make_encoder: Any, tmp_path: Path, head: Any) -> None:
    # 200 rois: 800 proposals are kept at most, and suppression leaves fewer, another number for every picture.
    model = outspoken(Detector(make_encoder(), DetectConfig(**OPTIONS, rois=200, head=head), ["a", "b"], True))
    program = written(model, tmp_path, "onnx")
    for image in (pictures(1, 64, 64), np.full((1, 64, 64, 3), 90, np.uint8)):
        expected, found = model.predict(image)[0], program(batch(image))
        assert 0 < len(expected["scores"]) <= 20
        assert (expected["scores"] > 0.37).all()
        np.testing.assert_allclose(found[2], expected["scores"], atol=1e-4)
        np.testing.assert_allclose(found[0], expected["boxes"], atol=1e-2)
        assert np.array_equal(found[1], expected["labels"])
        assert ((found[3].numpy() > 0.5) != expected["masks"]).mean() < 1e-3


def test_what_cannot_be_is_said_with_what_can(make_encoder: Any, encoder: Any, tmp_path: Path) -> None:
    save(Detector(make_encoder(), DetectConfig(**OPTIONS, rois=8), ["a"], False), tmp_path / "det")
    with pytest.raises(CutlineError, match="suppression of the others. Use --to onnx"):
        export(tmp_path / "det", tmp_path / "out", "torch_export")
    with pytest.raises(CutlineError, match="use --to onnx or --to torch_export, or export the encoder"):
        export(tmp_path / "det", tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_pretrained_models_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", "scratch:vit-tiny-64", str(tmp_path / "out"), "--to", "open_clip"])
    assert done.exit_code == 0, done.output
    assert "differs by 0.0e+00" in done.output
    assert (tmp_path / "out/open_clip_model.safetensors").is_file()
