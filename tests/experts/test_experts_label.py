"""`cutline label`: experts of transformers and of our own, what is stored, normals, kills, and errors."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import experts_made
import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from objectives_made import rows_of
from PIL import Image
from processes import run_cutline, start

from cutline.captions import engine
from cutline.errors import ConfigError, DataError
from cutline.experts.label import label_work, normals_of, summary
from cutline.pairs import Pairs
from cutline.pairs.columns import job_folder
from cutline.pairs.decode import decode
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.train import loop
from cutline.train.recipe import Recipe
from cutline.train.stream.maps import decode_map, label_size
from cutline.transfer import depth, segment
from cutline.transfer.depth import DepthConfig
from cutline.transfer.segment import SegmentConfig
from cutline.transfer.store import save

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of tiny models for `--with`."""
    folder = tmp_path_factory.mktemp("experts")
    names = ["segformer", "glpn", "dpt", *(["maskformer"] if find_spec("scipy") else [])]
    return {n: f"hf:{getattr(experts_made, n)(folder / n)}" for n in names}


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return experts_made.table(tmp_path / "t.lance")


def label(pairs: Pairs, expert: str, model: str, *overrides: str, batch: int = 4) -> Pairs:
    work = label_work(expert, model, "label", ["device=cpu", *overrides])
    return engine.run(pairs, work, "label", engine.RunConfig(batch=batch), show=False, say=lambda _: None)[0]


def stored(pairs: Pairs, kind: str, scale: float = 0.001) -> list[Any]:
    rows = pairs.read(range(len(pairs)), ["label"])
    return [None if r["label"] is None else decode_map(r["label"], kind, scale) for r in rows]


def pictures(pairs: Pairs) -> list[np.ndarray | None]:
    return [None if i == 7 else decode(r["image"]) for i, r in enumerate(pairs.read(range(len(pairs)), ["image"]))]


NEEDS_SCIPY = pytest.mark.skipif(not find_spec("scipy"), reason="transformers' MaskFormer needs scipy")


@pytest.mark.parametrize("name", ["segformer", pytest.param("maskformer", marks=NEEDS_SCIPY)])
def test_segmentation_of_transformers_is_stored_by_row(experts, pairs, name):
    new = label(pairs, "segment", experts[name], "side=40")
    folder = experts[name].removeprefix("hf:")
    kind = hf.AutoModelForSemanticSegmentation if name == "segformer" else hf.AutoModelForUniversalSegmentation
    model, eye = kind.from_pretrained(folder).eval(), hf.AutoImageProcessor.from_pretrained(folder)
    seen = set()
    for found, picture in zip(stored(new, "segment"), pictures(pairs), strict=True):
        if picture is None:
            assert found is None
            continue
        size = label_size(*picture.shape[:2], 40)
        with torch.no_grad():
            outputs = model(**eye(images=Image.fromarray(picture), return_tensors="pt"))
        said = eye.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].numpy()
        assert found.shape == size == said.shape
        assert (found == said).mean() > 0.995  # pictures of one size share a pass, which may round otherwise
        seen |= set(np.unique(found).tolist())
    assert len(seen) > 1
    assert seen <= set(range(5))
    provenance = new.provenance("label")
    assert provenance.settings == {"expert": "segment", "side": 40, "classes": list(experts_made.NAMES.values())}
    assert provenance.how == "label"
    assert provenance.model.startswith(f"hf:{name} ")
    failed = new.failed("label")
    assert [(r, c.n, c.examples) for r, c in failed.items()] == [("picture: truncated", 1, ["k7"])]
    lines, option = summary(new, "label")
    assert option == "objectives.experts.segment='{column: label, classes: 5}'"
    assert "%" in lines[0]


def test_depth_in_metres_and_relative(experts, pairs):
    metric = label(pairs, "depth", experts["glpn"], "side=32")
    assert metric.provenance("label").settings == {"expert": "depth", "side": 32, "unit": "metres", "scale": 0.001}
    folder = experts["glpn"].removeprefix("hf:")
    model, eye = hf.GLPNForDepthEstimation.from_pretrained(folder).eval(), hf.GLPNImageProcessor.from_pretrained(folder)
    picture, found = pictures(pairs)[4], stored(metric, "depth")[4]
    with torch.no_grad():
        outputs = model(**eye(images=Image.fromarray(picture), return_tensors="pt"))
    said = eye.post_process_depth_estimation(outputs, target_sizes=[found.shape])[0]["predicted_depth"].numpy()
    assert np.abs(found - said).max() < 0.002
    assert 0 < found.min() < found.max() <= 10
    assert summary(metric, "label")[1] == "objectives.experts.depth='{column: label}'"
    metric.drop("label")
    relative = label(Pairs.open(pairs.path), "depth", experts["dpt"])
    assert relative.provenance("label").settings["unit"] == "relative"
    for values in stored(relative, "depth", relative.provenance("label").settings["scale"]):
        assert values is None or (values.max() == pytest.approx(1) and 0 < values.min() < 1e-4)
    assert summary(relative, "label")[1] == "objectives.experts.depth='{column: label, relative: true}'"


def test_normals_of_a_plane_are_its_own():
    """n · P = c seen through a camera of 70 degrees; in a picture that is not square."""
    normal = np.array([0.3, -0.5, -0.8]) / np.linalg.norm([0.3, -0.5, -0.8])
    h, w = 30, 50
    focal = w / 2 / np.tan(np.radians(35))
    v, u = np.mgrid[0:h, 0:w]
    rays = np.stack([(u + 0.5 - w / 2) / focal, (v + 0.5 - h / 2) / focal, np.ones((h, w))], 2)
    depth = -2.0 / (rays @ normal)
    assert (depth > 0).all()
    found = normals_of(depth.astype(np.float32), 70.0)
    assert np.abs(found[1:-1, 1:-1] - normal).max() < 1e-3
    assert np.abs(normals_of(depth.astype(np.float32), 40.0)[1:-1, 1:-1] - normal).max() > 0.02
    depth[10, 20] = 0
    holes = np.abs(normals_of(depth.astype(np.float32), 70.0)).sum(2) == 0
    assert holes.sum() == 5  # itself and its neighbours in four directions
    wall = normals_of(np.full((8, 8), 3.0, np.float32), 60.0)
    assert np.allclose(wall, [0, 0, -1], atol=1e-6)
    assert not normals_of(np.ones((1, 5), np.float32), 60.0).any()


def test_normals_come_from_depth_in_metres(experts, pairs):
    new = label(pairs, "normals", experts["glpn"], "fov=50")
    assert new.provenance("label").settings == {"expert": "normals", "side": 64, "fov": 50.0}
    for found in stored(new, "normals"):
        if found is not None:
            length = np.linalg.norm(found, axis=2)
            there = length > 0.5  # resizing a wild map of depth gives negative values, which are no reading
            assert there.mean() > 0.5
            assert np.abs(length - there).max() < 1e-5
            assert found[..., 2].mean() < 0  # to the camera
    assert summary(new, "label")[1] == "objectives.experts.normals='{column: label}'"
    with pytest.raises(ConfigError, match=r"relative depth, which does not determine normals.*unit=metres"):
        label_work("normals", experts["dpt"], "n").provenance()
    label_work("normals", experts["dpt"], "n", ["unit=metres"]).provenance()


def test_errors_name_what_to_change(experts, tmp_path):
    with pytest.raises(ConfigError, match="'segment', 'depth' or 'normals' .got 'edges'"):
        label_work("edges", "x", "c")
    with pytest.raises(DataError, match="does depth estimation"):
        label_work("depth", experts["segformer"], "c").provenance()
    with pytest.raises(DataError, match="does semantic segmentation"):
        label_work("segment", experts["glpn"], "c").provenance()
    with pytest.raises(DataError, match="holds no transferred model"):
        label_work("segment", str(tmp_path), "c").provenance()
    with pytest.raises(ConfigError, match=r"'column=d'.*--as"):
        label_work("segment", "x", "c", ["column=d"])
    with pytest.raises(ConfigError, match="did you mean 'side'"):
        label_work("segment", "x", "c", ["sid=3"])
    bare = tmp_path / "bare"
    hf.SegformerModel(hf.SegformerConfig(**experts_made.STAGES)).save_pretrained(bare)
    hf.SegformerImageProcessor().save_pretrained(bare)
    with pytest.raises(DataError, match="does not hold all weights of a SegformerForSemanticSegmentation"):
        label_work("segment", f"hf:{bare}", "c").load()


def test_an_own_run_labels_scenes_through_kills_and_the_recipe_learns_from_it(tmp_path):
    """The chain of `recipes/scenes/experts.yaml`, a few steps each."""
    write_pairs(parse_spec("scenes:n=160,size=64,objects=48"), tmp_path / "scenes.lance")
    data, brief = "scenes:n=8,size=64,seed=2,objects=48", {"head": "linear", "steps": 2, "batch": 2}
    save(segment.fit("scratch:vit-tiny-64", data, SegmentConfig.model_validate(brief)), tmp_path / "segment" / "model")
    save(depth.fit("scratch:vit-tiny-64", data, DepthConfig.model_validate(brief)), tmp_path / "depth" / "model")
    command = ["label", "scenes.lance", "--expert", "segment", "--with", "segment", "--as", "seg", "--batch", "2"]
    job = Path(job_folder(str(tmp_path / "scenes.lance"), "seg")) / "00000000.rows"
    child = start("-m", "cutline.cli", *command, cwd=tmp_path)
    while not job.exists() or job.stat().st_size < 5000:
        assert child.process.is_alive()
        time.sleep(0.02)
    child.killed()
    pairs = Pairs.open(tmp_path / "scenes.lance")
    assert "seg" not in pairs.columns
    done = run_cutline(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seg: 160 of 160 rows" in done.stdout
    assert "Next: cutline train RECIPE.yaml data.pairs=scenes.lance objectives.experts.segment=" in done.stdout
    with pytest.raises(DataError, match="run of `cutline transfer segment`, and --expert asks for depth"):
        label_work("depth", str(tmp_path / "segment"), "d").provenance()

    for expert, folder, column in (("segment", "segment", "again"), ("depth", "depth", "depth")):
        work = label_work(expert, str(tmp_path / folder), column, ["device=cpu"])
        pairs = engine.run(Pairs.open(pairs.path), work, column, engine.RunConfig(), show=False, say=lambda _: None)[0]
    rows = pairs.read(range(160), ["seg", "again"])
    same = [(decode_map(r["seg"], "segment") == decode_map(r["again"], "segment")).mean() for r in rows]
    assert np.mean(same) > 0.999  # batches of another size may round otherwise
    assert len(pairs.provenance("seg").settings["classes"]) == 103
    values = yaml.safe_load((RECIPES / "scenes" / "experts.yaml").read_text())
    values["data"]["pairs"] = pairs.path
    values["train"] |= {"batch": 8, "samples": 8}
    row = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "run", show=False))[0]
    assert np.isfinite(row["loss"])
    assert row["experts/segment"] > 0 < row["experts/depth"]
