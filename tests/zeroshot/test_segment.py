"""Segmentation with words: windows, thresholds and refinement against plain loops; names; a data set and a picture scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_made import save
from PIL import Image
from torch.nn import functional as F

from cutline import towers
from cutline.config import load
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.record import Result
from cutline.towers.config import TowerConfig
from cutline.transfer.batches import resize_image
from cutline.transfer.metrics import Confusion
from cutline.transfer.targets import class_names as public
from cutline.zeroshot.dense import DenseTower
from cutline.zeroshot.readable import BACKGROUND, readable
from cutline.zeroshot.refine import pamr
from cutline.zeroshot.segment import SegmentConfig, WordSegmenter, chance, draw_picture, names_of, segment

NAMES = [["background", "sky"], ["red box"], ["blue box", "azure box", "navy box"]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "layers": 1, "heads": 1}
    return towers.build(TowerConfig(custom={"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})).eval()


def words(model, **options):
    return WordSegmenter(model, NAMES, SegmentConfig(prompts="name", **options))


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_the_defaults_follow_the_towers_size(model):
    config = words(model).config
    assert (config.short, config.window, config.stride) == (48, 32, 16)
    clip = SegmentConfig().fitted(224)
    assert (clip.short, clip.window, clip.stride) == (336, 224, 112)


@pytest.mark.parametrize("size", [(48, 48), (30, 77), (200, 41)])
def test_windows_equal_a_loop_of_one_window_forwards(model, size):
    segmenter, image = words(model, short=44, window=32, stride=12), pictures(size)[0]
    small = resize_image(torch.from_numpy(image).permute(2, 0, 1), segmenter._size(torch.zeros(3, *size)))
    x = (small.float() - segmenter.mean) / segmenter.std
    tower, (h, w) = DenseTower(towers.load_encoder(model), "sclip"), x.shape[1:]
    assert min(h, w) == 44
    total, seen = torch.zeros(len(segmenter.words.weights), h, w), torch.zeros(h, w)
    places = [[*range(0, n - 32, 12), n - 32] for n in (h, w)]
    for top in places[0]:
        for left in places[1]:
            with torch.no_grad():
                cells = F.normalize(tower(x[None, :, top : top + 32, left : left + 32]), dim=1)[0]
            cosines = torch.einsum("dhw,md->mhw", cells, segmenter.words.weights)
            total[:, top : top + 32, left : left + 32] += F.interpolate(cosines[None], (32, 32), mode="bilinear")[0]
            seen[top : top + 32, left : left + 32] += 1
    with torch.no_grad():
        got = segmenter.cosines(x[None], (h, w))[0]
        full = segmenter.cosines(x[None], size)[0]
    torch.testing.assert_close(got, total / seen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full, F.interpolate(got[None], size, mode="bilinear")[0], atol=1e-5, rtol=1e-5)
    best = torch.stack([full[:2].amax(0), full[2], full[3:].amax(0)])  # of each class its best name
    assert (segmenter.predict([image])[0] == best.argmax(0).numpy()).mean() > 0.999


def test_a_picture_that_fits_one_window_is_seen_once(model):
    segmenter = words(model, short=32, method="plain")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cells = F.normalize(segmenter.tower(x), dim=1)
        expected = F.interpolate(F.conv2d(cells, segmenter.words.weights[:, :, None, None]), (32, 32), mode="bilinear")
        torch.testing.assert_close(segmenter.cosines(x, (32, 32)), expected)


def test_batches_of_windows_and_pictures_change_nothing(model):
    images = pictures((40, 40), (40, 40), (40, 40), (33, 50))
    one = words(model, batch=1).predict(images)
    for batch in (3, 64):
        for a, b in zip(one, words(model, batch=batch).predict(images), strict=True):
            assert (a == b).mean() > 0.999  # but for ties within rounding


def test_pictures_smaller_than_a_patch_and_long_ones_have_a_map_of_their_size(model):
    images = pictures((2, 3), (1, 400))
    segmenter = words(model)
    assert [ids.shape for ids in segmenter.predict(images)] == [(2, 3), (1, 400)]
    assert segmenter._size(torch.zeros(3, 1, 400)) == (1, 384)


def test_uncertain_pixels_and_small_classes_are_background(model):
    image = pictures((20, 24))[0]
    segmenter = words(model, threshold=0.3, area=0.4, scale=30.0)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    with torch.no_grad():
        cosines = next(segmenter._each(pixels[None]))
    shares = (30 * cosines).softmax(0)
    best = torch.stack([shares[:2].amax(0), shares[2], shares[3:].amax(0)])
    first = best.argmax(0)
    front = max(int((first > 0).sum()), 1)
    for k in (1, 2):
        if (first == k).sum() <= 0.4 * front:
            best[k] = 0
    expected = torch.where(best.amax(0) < 0.3, 0, best.argmax(0))
    assert (segmenter.predict([image])[0] == expected.numpy()).all()
    assert not (expected == words(model).predict([image])[0]).all()


def test_a_threshold_without_a_background_is_refused(model):
    with pytest.raises(ConfigError, match="threshold and area give pixels to the class 'background'.*a, b"):
        WordSegmenter(model, [["a"], ["b"]], SegmentConfig(threshold=0.1))


def test_pamr_equals_a_plain_loop():
    torch.manual_seed(0)
    image, scores = torch.rand(1, 2, 5, 6, dtype=torch.float64), torch.rand(1, 3, 5, 6, dtype=torch.float64)
    dilations, now = (1, 3), scores[0]
    for _ in range(2):
        after = torch.empty_like(now)
        for i in range(5):
            for j in range(6):
                around = [(min(max(i + a * d, 0), 4), min(max(j + b * d, 0), 5), (a, b))
                          for d in dilations for a in (-1, 0, 1) for b in (-1, 0, 1)]  # fmt: skip
                spread = torch.stack([image[0, :, r, c] for r, c, _ in around]).std(0)
                near = [(r, c) for r, c, step in around if step != (0, 0)]
                alike = [
                    -((image[0, :, i, j] - image[0, :, r, c]).abs() / (0.1 * spread + 1e-8)).mean() for r, c in near
                ]
                weights = torch.stack(alike).softmax(0)
                after[:, i, j] = sum(w * now[:, r, c] for w, (r, c) in zip(weights, near, strict=True))
        now = after
    torch.testing.assert_close(pamr(image, scores, dilations, 2)[0], now)


def test_refined_scores_stop_at_edges():
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 255.0
    scores = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    scores[..., 20:] += 5
    refined = pamr(image, scores)
    assert refined[..., :20].max() < 1.01
    assert refined[..., 20:].min() > 4.99


def test_names_of_public_data_sets_are_readable():
    assert readable(["fence_post", "SignSymbol", "wall-other-merged", "desk-stuff"]) == [
        ["fence post"], ["Sign Symbol"], ["wall"], ["desk"],
    ]  # fmt: skip
    voc, context = readable(public("voc")), readable(public("context"))
    assert voc[0] == list(BACKGROUND)
    assert "person in shirt" in voc[15]
    assert context[0] == ["background"]
    for kind in ("ade20k", "cocostuff"):
        assert len(readable(public(kind))) == len(public(kind))
    assert len(readable(public("voc")[1:])) == 20


def test_two_classes_that_read_alike_and_wrong_counts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="classes 1 and 2 are both called 'fence post'"):
        readable(["fence_post", "fence post"])
    (tmp_path / "names.txt").write_text("\ufeffground, floor\n\nred\n", encoding="utf-8")
    config = SegmentConfig(names=str(tmp_path / "names.txt"))
    assert names_of(config, ["a", "b"]) == [["ground", "floor"], ["red"]]
    with pytest.raises(ConfigError, match="has 2 classes and the data 3"):
        names_of(config, ["a", "b", "c"])


def test_chance_is_what_knowing_nothing_gets():
    rng = torch.Generator().manual_seed(0)
    truth = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 200_000, True, generator=rng)
    found = {}
    for name, guess in (
        ("uniform", torch.randint(0, 4, truth.shape, generator=rng)),
        ("majority", torch.zeros_like(truth)),
    ):
        confusion = Confusion(4)
        confusion.update(guess, truth)
        found[name] = confusion.scores()
    expected = chance(confusion)
    assert expected["chance_miou"] == pytest.approx(found["uniform"]["miou"], abs=0.002)
    assert expected["chance_accuracy"] == pytest.approx(found["uniform"]["accuracy"], abs=0.002)
    assert expected["chance_macc"] == pytest.approx(found["uniform"]["macc"], abs=0.005)
    assert expected["majority_miou"] == pytest.approx(found["majority"]["miou"], abs=1e-9)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 12)):
        for i in range(count):
            save(tmp_path / split / "images" / f"{i}.png", rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
            save(tmp_path / split / "masks" / f"{i}.png", rng.integers(0, 3, (24, 40), dtype=np.uint8))
    (tmp_path / "classes.txt").write_text("ground\nred_box\nblueBox")
    return tmp_path


def test_a_data_set_is_scored_with_its_protocol_and_a_drawing(model, folder, capsys):
    save(folder / "val" / "masks" / "3.png", np.full((24, 40), 7, np.uint8))  # an id that no class has
    options = {"prompts": "photo", "method": "maskclip", "names": ["ground", "red box", "blue box"]}
    result = segment(model, f"folder:{folder}", SegmentConfig(**options), folder / "out")
    assert "1 of 12 pictures skipped (1 × label out of range)" in capsys.readouterr().err
    assert Result.read(folder / "out") == result
    segmenter, confusion = (
        WordSegmenter(model, [["ground"], ["red box"], ["blue box"]], SegmentConfig(**options)),
        Confusion(3),
    )
    for i in (k for k in range(12) if k != 3):
        image, mask = (np.asarray(Image.open(folder / "val" / part / f"{i}.png")) for part in ("images", "masks"))
        confusion.update(torch.from_numpy(segmenter.predict([image])[0]), torch.from_numpy(mask.astype(np.int64)))
    assert result.metrics["miou"] == pytest.approx(confusion.scores()["miou"], abs=1e-3)
    assert result.metrics["pictures"] == 11
    assert set(result.per_class["iou"]) == {"ground", "red_box", "blueBox"}
    settings = result.protocol.settings
    assert (settings["method"], settings["short"], settings["skipped"]) == ("maskclip", 48, 1)
    assert "scale" not in settings  # without a threshold
    assert (
        settings["names_hash"]
        != segment(model, f"folder:{folder}", SegmentConfig(prompts="photo")).protocol.settings["names_hash"]
    )
    assert (folder / "out" / "samples.png").stat().st_size > 1000


def test_masks_of_other_classes_stop_it(model, folder):
    for i in range(3):
        save(folder / "val" / "masks" / f"{i}.png", np.full((24, 40), 7, np.uint8))
    with pytest.raises(DataError, match=r"[23] × label out of range"):
        segment(model, f"folder:{folder}", SegmentConfig())


def test_an_encoder_without_a_text_tower_says_what_it_can_do():
    with pytest.raises(CutlineError, match="knows no words. It can be transferred"):
        segment("scratch:resnet18", "scenes:n=4,size=48", SegmentConfig())


@pytest.mark.parametrize(("wrong", "message"), [
    (["window=20", "stride=30"], "at most the window of 20"), (["method=proxyclip"], "give both, or neither"),
    (["method=sclipp"], "'sclip'"), (["scale=0"], "greater than 0"),
    (["scale=65"], "scale is of threshold"), (["scale=65", "area=0.1"], "scale is of threshold"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        load(SegmentConfig, None, wrong)


def test_a_stride_beyond_the_towers_own_window_is_refused(model):
    with pytest.raises(ConfigError, match="at most the window of 32"):
        words(model, stride=40)


def test_the_command_draws_a_picture_and_scores_scenes(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures((30, 50))[0]).save("photo.jpg")
    command = ["zeroshot", "segment", "--model", "scratch:vit-tiny-64"]
    done = here(*command, "--picture", "photo.jpg", "--classes", "a red apple; grass, lawn; sky", "--out", "one")
    assert done.returncode == 0, done.stderr
    assert Image.open("one/photo.png").width > 400
    assert np.asarray(Image.open("one/photo.ids.png")).shape == (30, 50)
    assert Path("one/classes.txt").read_text() == "a red apple\ngrass\nsky"
    done = here(*command, "--data", "scenes:n=4,size=48", "pictures=2", "prompts=name", "method=naclip", "--out", "two")
    assert done.returncode == 0, done.stderr
    assert "chance_miou" in done.stdout
    assert json.loads(Path("two/result.json").read_text())["protocol"]["task"] == "zeroshot-segment"
    assert "give --data SPEC to score on, or --picture" in here(*command).stderr


def test_what_is_no_picture_is_told(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the picture .*none\.jpg"):
        draw_picture("scratch:vit-tiny-64", tmp_path / "none.jpg", SegmentConfig(names="a; b"), tmp_path)
