"""The world's pictures and labels: determinism, geometry, and that labels, layout and pictures agree."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from cutline.errors import ConfigError, DataError
from cutline.scenes import CLASSES, SceneConfig, Scenes, parse_spec, render
from cutline.scenes.draw import FAR, draw
from cutline.scenes.layout import BAND, MIN_VISIBLE, layout
from cutline.scenes.objects import FAMILIES, GROUNDS, OBJECTS, SKY
from cutline.scenes.sheet import SHEET, sprite

ALL = ["key", "image", "alt", "captions", "semantic", "depth", "instances", "boxes", "objects"]


def config(**values: object) -> SceneConfig:
    return SceneConfig.model_validate({"n": 1000, "size": 64} | values)


def equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)  # type: ignore[arg-type]
    return a == b


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    one, two = Scenes(config(seed=3)), Scenes(config(seed=3, n=50))
    rows = [17, 3, 44, 3]
    first, second = one.read(rows, ALL), two.read(rows[::-1], ALL)[::-1]
    assert all(equal(a[c], b[c]) for a, b in zip(first, second, strict=True) for c in ALL)
    alone = render(3, 17, 64)
    assert all(equal(first[0][c], alone[c]) for c in ALL)
    other = Scenes(config(seed=4)).read([17], ALL)[0]
    assert not equal(first[0]["image"], other["image"])
    assert first[0]["captions"] != other["captions"]


def test_threads_read_what_one_thread_reads() -> None:
    scenes = Scenes(config(seed=8))
    serial = scenes.read(range(48), ALL)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda r: scenes.read([r], ALL)[0], range(48)))
    assert all(equal(a[c], b[c]) for a, b in zip(serial, parts, strict=True) for c in ALL)


def test_size_and_mix_leave_the_scene_alone() -> None:
    small, large = Scenes(config(size=64, mix="web")), Scenes(config(size=192, mix="harsh"))
    for a, b in zip(small.read(range(20), ALL), large.read(range(20), ALL), strict=True):
        assert a["captions"] == b["captions"]
        same = [{k: v for k, v in o.items() if k != "box"} for o in a["objects"]]
        assert same == [{k: v for k, v in o.items() if k != "box"} for o in b["objects"]]
        np.testing.assert_allclose(a["boxes"] / 64, b["boxes"] / 192, atol=2.5 / 64)
        coarse = b["image"].reshape(64, 3, 64, 3, 3).mean((1, 3))
        assert np.abs(a["image"] - coarse).mean() < 12


def test_the_fingerprint_changes_with_what_changes_the_data() -> None:
    base = Scenes(config()).fingerprint
    assert Scenes(config()).fingerprint == base
    changed = [config(seed=1), config(size=65), config(n=999), config(mix="mild"), config(mix={"one": 1.0})]
    assert len({base, *(Scenes(c).fingerprint for c in changed)}) == 1 + len(changed)


@pytest.mark.parametrize("size", [48, 64, 97, 448])
def test_labels_agree_with_each_other(size: int) -> None:
    for index in range(12 if size < 400 else 3):
        row = render(5, index, size)
        scene = layout(5, index)
        instances, semantic, depth = row["instances"], row["semantic"], row["depth"]
        assert row["image"].shape == (size, size, 3)
        assert (row["image"].dtype, semantic.dtype, depth.dtype) == (np.uint8, np.uint8, np.float32)
        assert len(row["boxes"]) == len(scene.items) == len(row["objects"])
        for i, (item, box) in enumerate(zip(scene.items, row["boxes"].astype(int), strict=True)):
            mask = instances == i + 1
            assert mask.any()
            assert CLASSES[semantic[mask][0]] == item.name
            assert len(np.unique(semantic[mask])) == 1
            np.testing.assert_allclose(depth[mask], item.depth, rtol=1e-6)
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        bare = instances == 0
        y = np.broadcast_to(((np.arange(size) + 0.5) / size)[:, None], bare.shape)
        assert (semantic[bare & (y > scene.horizon)] == scene.ground).all()
        assert (semantic[bare & (y < scene.horizon)] == SKY).all()


def test_depth_of_the_ground_is_that_of_a_pinhole() -> None:
    for index in range(30):
        scene, row = layout(9, index), render(9, index, 96)
        for r, c in np.argwhere((row["instances"] == 0) & (row["semantic"] != SKY))[::101]:
            z = scene.focal * scene.height / ((r + 0.5) / 96 - scene.horizon)
            assert row["depth"][r, c] == pytest.approx(z if z <= FAR else 0, rel=1e-5)
        assert (row["depth"][row["semantic"] == SKY] == 0).all()


def test_objects_stand_on_the_ground_at_their_depth_and_true_height() -> None:
    for index in range(100):
        scene = layout(2, index)
        for item in scene.items:
            height = OBJECTS[item.kind].height
            assert item.size == pytest.approx(scene.focal * height / item.depth)
            assert item.depth == pytest.approx(scene.focal * scene.height / (item.y - scene.horizon))
            assert BAND[0] <= height / scene.height <= BAND[1]
            assert item.depth <= FAR


def test_the_picture_does_not_tell_the_scale() -> None:
    """Twice the camera's height and every depth: the same picture with twice the depth."""
    scene = layout(1, 4)
    items = tuple(replace(i, depth=2 * i.depth) for i in scene.items)
    a, b = draw(scene, 64), draw(replace(scene, height=2 * scene.height, items=items), 64)
    assert np.array_equal(a["image"], b["image"])
    both = (a["depth"] > 0) & (b["depth"] > 0)
    assert both.any()
    np.testing.assert_allclose(b["depth"][both], 2 * a["depth"][both], rtol=1e-6)


def test_the_nearer_object_covers_the_farther() -> None:
    overlaps = 0
    for index in range(60):
        scene = layout(6, index)
        alone = [draw(replace(scene, items=(item,)), 64)["instances"] > 0 for item in scene.items]
        together = draw(scene, 64)["instances"]
        for i, far in enumerate(scene.items):
            for j in range(i + 1, len(scene.items)):
                assert scene.items[j].depth <= far.depth
                overlap = alone[i] & alone[j]
                overlaps += int(overlap.sum())
                assert (together[overlap] > i + 1).all()
    assert overlaps > 1000


def test_visible_shares_hold_in_the_picture() -> None:
    """Against masks drawn on a canvas so wide that nothing is cut off."""
    errors = []
    for index in range(60):
        scene = layout(11, index)
        shown = np.bincount(draw(scene, 128)["instances"].ravel(), minlength=len(scene.items) + 1)[1:]
        for item, pixels in zip(scene.items, shown, strict=True):
            art = sprite(item.kind, item.colour)
            solid = np.asarray(art.levels[0].getchannel("a")) > 127
            whole = solid.sum() * (item.size * 128 / art.height) ** 2
            errors.append(abs(pixels / whole - item.visible))
            assert item.visible >= MIN_VISIBLE
    assert np.quantile(errors, 0.95) < 0.12


def test_the_median_object_is_well_visible() -> None:
    shares, counts = [], []
    for row in Scenes(config(seed=12)).read(range(300), ["instances", "objects"]):
        n = len(row["objects"])
        shares += (np.bincount(row["instances"].ravel(), minlength=n + 1)[1:] / 64**2).tolist()
        counts.append(n)
    assert 0.06 <= np.median(shares) <= 0.12
    assert np.quantile(shares, 0.05) > 0.02
    assert 2 <= np.median(counts) <= 4
    assert min(counts) == 1
    assert max(counts) >= 7


def test_no_object_is_rare() -> None:
    seen = np.zeros(len(OBJECTS))
    for index in range(2000):
        for kind in {item.kind for item in layout(13, index).items}:
            seen[kind] += 1
    assert seen.min() > 0.5 * seen.mean()
    assert seen.max() < 2 * seen.mean()


@pytest.mark.parametrize("objects", [24, 48, 96])
def test_a_smaller_world_has_the_first_objects_of_each_family(objects: int) -> None:
    allowed = {o.name for f in FAMILIES for o in [o for o in OBJECTS if o.family == f][: objects // 8]}
    seen = {i.name for index in range(600) for i in layout(3, index, objects).items}
    assert len(allowed) == objects
    assert seen == allowed


def test_the_table_of_objects_is_sane() -> None:
    assert len(OBJECTS) == 96
    assert [sum(o.family == f for o in OBJECTS) for f in FAMILIES] == [12] * 8
    assert len({o.name for o in OBJECTS}) == len({o.code for o in OBJECTS}) == len({o.many for o in OBJECTS}) == 96
    assert (*GROUNDS, "sky", *(o.name for o in OBJECTS)) == CLASSES
    for o in OBJECTS:
        assert 0.05 < o.height < 4
        assert not o.hues or o.colour in o.hues
        assert all((o.de, o.es, o.fr))
    assert SHEET.stat().st_size <= 2_000_000


def test_colour_variants_differ_in_hue_and_not_in_shape() -> None:
    kind = next(k for k, o in enumerate(OBJECTS) if o.name == "car")
    means = {}
    for colour in OBJECTS[kind].hues:
        pixels = np.asarray(sprite(kind, colour).levels[0])
        assert np.array_equal(pixels[..., 3], np.asarray(sprite(kind, "red").levels[0])[..., 3])
        means[colour] = pixels[..., :3].astype(float).mean((0, 1))
    assert means["red"].argmax() == 0
    assert means["green"].argmax() == 1
    assert means["blue"].argmax() == 2


def test_importing_scenes_loads_neither_torch_nor_lance_nor_the_sheet() -> None:
    code = (
        "import sys, cutline.scenes, cutline.scenes.sheet as s, cutline.scenes.grounds as g;"
        "print([m for m in ('torch', 'lance', 'pyarrow') if m in sys.modules], s._cells.cache_info().currsize,"
        " g.texture.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "0", "0"]


def test_reading_scenes_needs_no_lance() -> None:
    code = "import sys; from cutline.scenes import render; render(0, 0, 64); print('lance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_spec_is_parsed() -> None:
    assert parse_spec("scenes:") == SceneConfig.model_validate({})
    spec = parse_spec("scenes: size=96 ,n=12,seed=7,mix=harsh")
    assert (spec.n, spec.size, spec.seed, spec.mix) == (12, 96, 7, "harsh")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("scenes:sise=64", "valid keys are n, size, seed, mix, objects"),
        ("scenes:n=many", "n: .*many"),
        ("scenes:size=32", "48"),
        ("scenes:size=1000", "448"),
        ("scenes:mix=best", "web, mild, harsh"),
        ("scenes:objects=50", "multiple of 8"),
        ("scenes:n", "key=value"),
        ("scenes:n=1,n=2", "twice"),
        ("camvid:x", "scenes:n="),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_spec(spec)


def test_unknown_columns_and_rows_are_named() -> None:
    scenes = Scenes(config(n=10))
    with pytest.raises(DataError, match="'caption'"):
        scenes.read([0], ["caption"])
    with pytest.raises(DataError, match="no scene 10"):
        scenes.read([0, 10], ["key"])
    assert len(scenes) == 10
