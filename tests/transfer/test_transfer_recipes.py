"""The papers' recipes: each is a config of its task, and what it builds has as many parameters as is published."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from typer.testing import CliRunner

from cutline.cli import app
from cutline.config import load
from cutline.record import Result
from cutline.towers.encoder import Encoder
from cutline.towers.store import load as load_tower
from cutline.towers.store import load_encoder
from cutline.transfer import heads
from cutline.transfer.classify import ClassifyConfig
from cutline.transfer.depth import DepthConfig, DepthEstimator
from cutline.transfer.detect import DetectConfig
from cutline.transfer.detector import Detector
from cutline.transfer.options import TransferConfig
from cutline.transfer.segment import SegmentConfig, Segmenter

RECIPES = Path(__file__).parents[2] / "recipes" / "transfer"
CONFIGS: dict[str, type[TransferConfig]] = {
    "ade20k": SegmentConfig, "cityscapes": SegmentConfig, "voc": SegmentConfig, "nyuv2": DepthConfig, "kitti": DepthConfig, "coco": DetectConfig, "imagenet": ClassifyConfig,
}  # fmt: skip
VIT, MCI2, SWIN, RESNET = "vit_base_patch16_224", "fastvit_mci2", "swin_tiny_patch4_window7_224", "resnet50"


def config_of(name: str) -> Any:
    return load(CONFIGS[name.split("-")[0]], RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_config_of_its_task(path: Path) -> None:
    config = config_of(path.stem)
    for key, value in yaml.safe_load(path.read_text()).items():
        found = getattr(config, key)
        assert found == (tuple(value) if isinstance(value, list) else (value, value) if key == "crop" else value), key


@pytest.mark.parametrize(
    ("name", "encoder", "millions"),
    [
        ("ade20k-upernet", VIT, 120.13),
        ("ade20k-upernet-mae", VIT, 162.66),
        ("ade20k-upernet", SWIN, 59.94),  # 60 M published
        (
            "ade20k-upernet",
            "swin_base_patch4_window7_224",
            121.94,
        ),  # 121 M published; open_clip's of that name projects
        ("ade20k-fpn-mobile", RESNET, 28.50),  # 28.5 M published
        ("ade20k-fpn-mobile", MCI2, 39.47),
        ("ade20k-linear", VIT, 85.92),
        ("cityscapes-upernet", SWIN, 59.84),  # 59 M published of InternImage-T
        ("nyuv2-mim", VIT, 86.09),
        ("nyuv2-linear", VIT, 87.38),
        ("nyuv2-linear-dinov3", VIT, 86.00),
        ("nyuv2-dpt", VIT, 109.41),
        ("coco-vitdet", VIT, 110.90),  # 111 M published
        ("coco-cascade", VIT, 141.16),  # 141 M published
    ],
)
def test_what_a_recipe_builds_has_the_size_of_the_docs(
    name: str, encoder: str, millions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "hash", "of no weights")
    config = config_of(name)
    with torch.device("meta"):
        tower = load_encoder(load_tower(f"scratch:{encoder}", device="meta"))
        model: torch.nn.Module
        if isinstance(config, SegmentConfig):
            classes = 19 if name.startswith("cityscapes") else 150
            model = Segmenter(tower, config, [str(k) for k in range(classes)])
        elif isinstance(config, DepthConfig):
            model = DepthEstimator(tower, config)
        else:
            model = Detector(tower, config, [str(k) for k in range(80)], masks=True)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("tower", "fpn", "millions"), [("swin_large_patch4_window12_384", False, 234), ("poolformer_s12", True, 15.7)]
)
def test_heads_on_other_towers_have_the_published_size(tower: str, fpn: bool, millions: float) -> None:
    with torch.device("meta"):
        trunk = timm.create_model(tower, features_only=True)
        widths = trunk.feature_info.channels()
        parts = (
            [heads.FPNHead(widths, 256, 150)] if fpn else [heads.UPerHead(widths, 512, 150), heads.FCNHead(widths, 150)]
        )
    assert sum(p.numel() for m in (trunk, *parts) for p in m.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_dpt_differs_from_transformers_by_what_its_docstring_leaves_out() -> None:
    """DPT-Large has 343 M published, which is transformers'; ours is without a unit that is not read."""
    from transformers import DPTConfig, DPTForDepthEstimation

    with torch.device("meta"):
        large = DPTForDepthEstimation(
            DPTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                      neck_hidden_sizes=[256, 512, 1024, 1024])
        )  # fmt: skip
        base = DPTForDepthEstimation(DPTConfig(neck_hidden_sizes=[96, 192, 384, 768]))
    assert sum(p.numel() for p in large.parameters()) / 1e6 == pytest.approx(343, abs=0.5)
    unread = base.neck.fusion_stage.layers[0].residual_layer1
    positions = (24**2 - 14**2) * 768  # at 384 pixels, ours at 224
    counts = [sum(p.numel() for p in m.parameters()) for m in (base, unread)]
    assert (counts[0] - counts[1] - positions) / 1e6 == pytest.approx(109.41, abs=0.005)


def test_the_command_takes_a_recipe_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["steps=2", "batch=2", "crop=48", "short=null", "pictures=2", "stride=24"]
    where = ["--encoder", "scratch:vit-tiny-64", "--data", "scenes:n=4,size=48"]
    done = CliRunner().invoke(
        app, ["transfer", "segment", "--recipe", str(RECIPES / "ade20k-linear.yaml"), *where, *small]
    )
    assert done.exit_code == 0, done.output
    settings = Result.read(next(tmp_path.glob("runs/*/segment-*-ade20k-linear-*"))).protocol.settings
    assert (settings["head"], settings["steps"], settings["weight_decay"], settings["stride"]) == (
        "linear",
        2,
        1e-3,
        24,
    )
