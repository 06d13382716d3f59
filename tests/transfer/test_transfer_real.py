"""A few steps on real photos and on scenes: the kinds of data read, train and score."""

from pathlib import Path
from typing import Any

import numpy as np

from cutline.transfer.data import open_data
from cutline.transfer.depth import DepthConfig, depth, fit, score
from cutline.transfer.segment import SegmentConfig, segment


def test_camvid(real_data: Path, encoder: Any, tmp_path: Path) -> None:
    data = open_data(f"camvid:{real_data}/camvid", "segment")
    assert len(data.classes) == 11
    assert "unlabelled" not in data.classes
    config = SegmentConfig(steps=5, batch=4, labels=8, pictures=6, crop=96, channels=64, lr=1e-3)
    result = segment(encoder, data, config, tmp_path)
    assert 0 < result.metrics["miou"] < 1
    assert result.protocol.settings["scored"] == 6


def test_rgbd(real_data: Path, encoder: Any, tmp_path: Path) -> None:
    config = DepthConfig(steps=5, batch=4, labels=8, pictures=6, crop=96, channels=16, deconvolutions=1)
    result = depth(encoder, f"folder:{real_data}/rgbd", config, tmp_path)
    assert 0 < result.metrics["rmse"] < 10


def test_scenes(encoder: Any) -> None:
    spec = "scenes:n=6,size=48,seed=3"
    quick: dict[str, Any] = {"steps": 2, "batch": 4, "pictures": 4, "channels": 64}
    assert segment(encoder, spec, SegmentConfig(**quick)).protocol.settings["scored"] == 4
    result = depth(encoder, spec, DepthConfig(**quick, split="test"))
    assert result.protocol.split == "test"
    assert result.protocol.settings["max_depth"] == 12


def test_dpt_beats_the_mean_depth_of_real_rooms(real_data: Path, encoder: Any) -> None:
    data = open_data(f"folder:{real_data}/rgbd", "depth")
    quick: dict[str, Any] = {"steps": 25, "batch": 8, "labels": 32, "pictures": 10, "crop": 96, "channels": 16}
    config = DepthConfig(head="dpt", **quick, lr=3e-3, layer_decay=1.0, max_depth=10)
    model = fit(encoder, data, config)
    train, val = (data.splits[s] for s in ("train", "val"))
    mean = np.mean([t[t > 0].mean() for t in (train.read(i).target for i in range(32))])
    errors = [np.sqrt(np.mean((t[t > 0] - mean) ** 2)) for t in (val.read(i).target for i in range(10))]
    assert score(model, data).metrics["rmse"] < 0.9 * np.mean(errors)
