"""ZSSeg: regions, the ensemble and the head of words against plain formulas; splits; training on seen classes alone;
resume; save and load; other data; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cutline import towers, transfer
from cutline.config import check
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.record import Result
from cutline.towers.config import TowerConfig
from cutline.towers.store import build, load_encoder
from cutline.transfer import loop
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.metrics import IGNORE, Confusion
from cutline.transfer.targets import class_names
from cutline.zeroshot.learned import LearnConfig, Prefix, learn
from cutline.zeroshot.maskformer import MaskFormer, Proposals, SeenLoss
from cutline.zeroshot.proposals import ProposalsConfig, across, class_maps, fit, load, predict, proposals, said, score
from cutline.zeroshot.regions import Regions, class_map, crops, ensemble
from cutline.zeroshot.texts import text_classifier
from cutline.zeroshot.unseen import scores, split_of, zero_shot

NAMES = ["ground", "red", "blue", "white"]
COLOURS = np.array([(60, 160, 60), (220, 40, 40), (40, 40, 220), (240, 240, 240)])
TINY: dict[str, Any] = {
    "unseen": ["blue"], "prompts": "photo", "channels": 64, "pyramid_channels": 32, "queries": 6, "layers": 2, "batch": 4,
    "steps": 6, "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "layers": 1, "heads": 1}
    return build(TowerConfig(custom={"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DenseData:
    """Grounds with a square of each of two other colours."""
    root = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([count, i])
            mask = np.zeros((32, 32), np.uint8)
            for left, k in zip((2, 18), rng.permutation([1, 2, 3])):
                top = rng.integers(0, 20)
                mask[top : top + 12, left : left + 12] = k
            Image.fromarray(COLOURS[mask].astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return open_data(f"folder:{root}", "segment")


def config(**given: Any) -> ProposalsConfig:
    return check(ProposalsConfig, {**TINY, **given})


def untrained(clip: Any, **given: Any) -> MaskFormer:
    torch.manual_seed(1)
    texts = F.normalize(torch.randn(4, 32), dim=-1)
    seen = torch.tensor([True, True, False, True])
    return MaskFormer(load_encoder(clip), config(**given), NAMES, texts, seen, torch.empty(0, 0))


def test_the_ensemble_and_the_class_map_equal_their_formulas():
    generator = torch.Generator().manual_seed(0)
    p_mf, p_clip = (torch.rand(3, 4, generator=generator) for _ in range(2))
    masks, seen = torch.rand(3, 2, 5, generator=generator), [True, False, True, False]
    got = ensemble(p_mf, p_clip, torch.tensor(seen), 0.8)
    for q in range(3):
        for c in range(4):
            m, k = p_mf[q, c].item(), p_clip[q, c].item()
            assert got[q, c].item() == pytest.approx(m**0.8 * k**0.2 if seen[c] else m**0.2 * k**0.8, rel=1e-5)
    torch.testing.assert_close(class_map(got, masks), sum(got[q][:, None, None] * masks[q] for q in range(3)))


def test_a_region_is_its_box_alone_with_the_mean_colour_around_the_mask():
    image, mask = torch.rand(3, 9, 12), torch.zeros(9, 12, dtype=torch.bool)
    mask[2, 3], mask[6, 8], mask[4, 5] = True, True, True  # a box of 5 x 6
    plain = torch.zeros(3, 5, 6)  # of a normalised picture, so zero is the mean
    for y, x in ((2, 3), (6, 8), (4, 5)):
        plain[:, y - 2, x - 3] = image[:, y, x]
    expected = F.interpolate(plain[None], (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(crops(image, mask[None], (8, 8)), expected)


def test_regions_are_classified_by_clip_and_masks_that_are_nowhere_keep_one(clip):
    regions, texts = Regions(clip), F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0] = True  # the whole picture, at the tower's own size
    p, valid = regions.probabilities(image, masks, texts)
    x = (image / 255 - torch.tensor(towers.load_encoder(clip).mean).view(3, 1, 1)) / torch.tensor(
        towers.load_encoder(clip).std
    ).view(3, 1, 1)
    cosine = F.normalize(clip.encode_image(x[None]), dim=-1) @ texts.T
    torch.testing.assert_close(p[0], (100 * cosine)[0].softmax(-1), rtol=1e-3, atol=1e-4)
    assert valid.tolist() == [True, False]
    assert (p[1] == 1).all()


def test_pictures_smaller_than_a_patch_have_a_map_of_their_size(clip):
    model = untrained(clip)
    model.regions = Regions(clip)
    small = [np.zeros((2, 3, 3), np.uint8), np.full((1, 40, 3), 9, np.uint8)]
    assert [ids.shape for ids in predict(model, small)] == [(2, 3), (1, 40)]


def test_class_logits_are_scaled_cosines_with_the_texts_and_no_object(clip):
    model = untrained(clip).eval()
    with torch.no_grad():
        queries = model.propose(torch.rand(2, 3, 32, 40)).queries  # (1, 2, 6, 32)
        logits = model.class_logits(queries, model.texts)
    words = [*model.texts, model.no_object[0]]
    for k, word in enumerate(words):
        expected = 100 * F.cosine_similarity(queries, word.detach(), dim=-1)
        torch.testing.assert_close(logits[..., k], expected, rtol=1e-4, atol=1e-3)


def test_the_loss_is_the_same_whatever_unseen_pixels_are_called_and_each_layer_has_its_share(clip):
    model, seen = untrained(clip), torch.tensor([True, True, False, True])
    loss = SeenLoss(seen, 0.1, 20.0, 1.0)
    target = torch.randint(0, 4, (2, 32, 40), generator=torch.Generator().manual_seed(4))
    found = model.propose(torch.rand(2, 3, 32, 40))
    assert len(found.queries) == 2
    values = [loss(model, found, target.where(target != 2, torch.tensor(other))).item() for other in (2, IGNORE)]
    assert values[0] == values[1] > 0
    layers = [loss(model, Proposals(found.queries[k : k + 1], found.masks[k : k + 1]), target) for k in range(2)]
    assert sum(layers).item() == pytest.approx(values[0], rel=1e-5)
    assert loss(model, found, target.where(target != 1, torch.tensor(2))).item() != values[0]
    assert loss(model, found, torch.full_like(target, 2)).isfinite()  # pictures that show nothing seen


def test_perfect_proposals_cost_next_to_nothing(clip):
    """Of two classes in a picture, whatever the order of the queries; the other queries say that they are no object."""
    model, seen = untrained(clip).eval(), torch.tensor([True, True, False, True])
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[0, 8:16, 8:24] = 3
    none = F.normalize(model.no_object.detach(), dim=-1)
    queries = torch.cat([none, model.texts[3:], none, model.texts[:1]])[None, None]
    masks = torch.stack([target[0] * 0 == 1, target[0] == 3, target[0] * 0 == 1, target[0] == 0])[None, None]
    loss = SeenLoss(seen, 0.1, 20.0, 1.0)
    right = loss(model, Proposals(queries, 80.0 * masks - 40), target).item()
    wrong = loss(model, Proposals(queries.flip(2), 80.0 * masks - 40), target).item()
    assert right < 0.01 < 1 < wrong


@pytest.mark.parametrize(("kind", "seen", "unseen"), [("voc", 15, 5), ("cocostuff", 156, 15)])
def test_the_papers_splits_have_the_published_sizes(kind, seen, unseen):
    judged, hidden = split_of(DenseData("segment", f"{kind}:x", {}, class_names(kind), ""), None)
    assert (len(judged) - len(hidden), len(hidden)) == (seen, unseen)
    assert set(hidden) < set(judged)
    assert "background" not in judged


@pytest.mark.parametrize("objects", [24, 48, 96])
def test_a_third_of_the_objects_of_scenes_is_unseen_and_others_are_not_judged(objects):
    made, seen = zero_shot(open_data(f"scenes:n=2,size=48,objects={objects}", "segment"), "scenes")
    assert (len(made.classes), int((~seen).sum())) == (7 + objects, objects // 3)
    assert made.notes["unseen"] == [c for c, known in zip(made.classes, seen) if not known]


def test_unseen_pixels_are_hidden_from_training_alone(data):
    made, seen = zero_shot(data, ["blue", "red"])
    assert seen.tolist() == [True, False, False, True]
    for name, hides in (("train", True), ("val", False)):
        for i in range(3):
            before, after = data.split(name).read(i).target, made.split(name).read(i).target
            np.testing.assert_array_equal(after, np.where(np.isin(before, [1, 2]) & hides, IGNORE, before))


def test_hiou_by_hand():
    confusion = Confusion(3)
    confusion.update(torch.tensor([0, 0, 1, 1, 2, 1]), torch.tensor([0, 0, 1, 2, 2, IGNORE]))
    got = scores(confusion, torch.tensor([True, True, False]))  # IoU 1, 1/2 and 1/2
    assert got == pytest.approx({"seen_miou": 0.75, "unseen_miou": 0.5, "hiou": 0.6})


def test_a_learned_prompt_goes_through_the_tower_in_place_of_words(clip, data):
    names = ["red", "blue"]
    prefix = Prefix(clip, names, 3)
    word = clip.token_embedding(towers.Tokenizer(clip)(["x"])[0, 1]).detach().expand(3, -1)
    plain = text_classifier(clip, [[n] for n in names], ["x x x {}."]).weights
    torch.testing.assert_close(prefix(word).detach(), plain, rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    made, seen = zero_shot(data, ["blue"])
    regions, rows = Regions(clip), range(8)
    one, two = (
        learn(regions, LearnConfig(tokens=3, steps=steps, lr=2.0), made.classes, seen, made.split("train"), rows, 0)
        for steps in (1, 30)
    )
    assert one.shape == (3, 32)
    assert (one - two).abs().max() > 0.01
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())


def test_a_tiny_model_learns_the_seen_classes_of_a_few_pictures(clip, data, monkeypatch):
    # An untrained tower's texts are nearly one; and what was never trained against, the unseen one, is left out below.
    monkeypatch.setattr("cutline.zeroshot.proposals.texts_of", lambda *_: (torch.eye(32)[:4], 0))
    model = fit(clip, data, config(steps=50, layers=1, layer_decay=1.0, flip=False, drop_path=0))
    part, confusion, seen = zero_shot(data, ["blue"])[0].split("train"), Confusion(4), model.seen.nonzero()[:, 0]
    for sample in (part.read(i) for i in range(8)):
        (maps,) = class_maps(model, torch.from_numpy(sample.image).permute(2, 0, 1)[None])
        confusion.update(seen[maps["maskformer"][seen].argmax(0)], torch.from_numpy(sample.target))
    assert confusion.iou()[seen].min() > 0.6


def test_resume_after_a_kill_gives_the_same_model(clip, data, tmp_path, monkeypatch):
    settings = config(save_every=2, learn={"tokens": 2, "steps": 3}, prompts=None)
    whole = fit(clip, data, settings, tmp_path / "whole")
    original = loop._Run.step
    monkeypatch.setattr(loop._Run, "step", lambda run, *a: 1 / 0 if run.done == 5 else original(run, *a))
    with pytest.raises(ZeroDivisionError):
        fit(clip, data, settings, tmp_path / "half")
    monkeypatch.setattr(loop._Run, "step", original)
    resumed = fit(clip, data, settings, tmp_path / "half", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(resumed.vectors) == 2


def test_a_class_is_said_by_one_name_and_the_background_by_its_own() -> None:
    assert said(["background", "aeroplane", "pottedplant"]) == ["background", "aeroplane", "potted plant"]


def test_a_run_is_written_loaded_and_scored_on_other_data(
    clip: Any, data: DenseData, tmp_path: Path, here: Callable[..., Any]
) -> None:
    source, out = str(towers.save(clip, tmp_path / "clip")), tmp_path / "out"
    options = [f"{k}={json.dumps(v)}" for k, v in TINY.items()] + ["backbone=scratch:test_vit"]
    command = ("zeroshot", "proposals", "--model", source, "--data", data.spec)
    done = here(*command, *options[:-1], "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"Written: {out}" in done.stdout
    assert "Next: cutline zeroshot proposals --model" in done.stdout
    assert (out / "samples.png").stat().st_size > 1000
    result, model = Result.read(out), load(out)
    again = score(model, data)
    assert again.metrics == result.metrics
    assert {"hiou", "seen_miou", "unseen_miou", "maskformer_hiou", "clip_hiou"} <= set(result.metrics)
    assert result.protocol.settings["unseen"] == ["blue"]
    assert result.metrics["truncated"] == 0
    assert again.protocol.encoder == result.protocol.encoder == source
    assert proposals(source, data, config(), out, resume=True) == result  # finished: nothing is trained
    with pytest.raises(ConfigError, match="another config, encoder or data"):
        proposals(source, data, config(lr=1e-4), out, resume=True)
    with pytest.raises(DataError, match="holds a MaskFormer, which is no transferred model"):
        transfer.load(out)
    other = here("zeroshot", "proposals", "--model", str(out), "--data", "scenes:n=2,size=48", "pictures=2")
    assert other.returncode == 0, other.stderr
    crossed = Result.read(next(out.glob("proposals-*")))
    assert (crossed.protocol.settings["weight"], crossed.protocol.settings["threshold"]) == (0.5, 0.4)
    with pytest.raises(ConfigError, match="no option of trained proposals"):
        across(out, data, ["lr=1"])


def test_a_backbone_of_its_own_may_be_any_tower(clip, data):
    model = fit(clip, data, config(backbone="scratch:resnet18", steps=1, drop_path=0))
    rates = {name.startswith("encoder."): model.layer_of(name) for name, _ in model.named_parameters()}
    assert rates == {True: 0, False: 1}
    assert predict(model, [data.split("val").read(0).image])[0].shape == (32, 32)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"unseen": ["blu"]}, "did you mean 'blue'"),
        ({"unseen": NAMES}, "all of the 4 classes are unseen"),
        ({"unseen": []}, "none of the 4 classes"),
        ({"unseen": None}, "no split 'folder'"),
        ({"channels": 40}, "no multiple of 64"),
        ({"learn": {}}, "stands in place of prompts"),
        ({"test": "slide"}, "whole pictures"),
        ({"learn": {"tokens": 40}, "prompts": None}, "leaves no room"),
    ],
)
def test_settings_that_make_no_sense_are_refused(clip, data, given, error):
    with pytest.raises(ConfigError, match=error):
        fit(clip, data, config(**given))


def test_an_image_tower_without_words_is_refused(data):
    with pytest.raises(CutlineError, match="without a text tower"):
        fit("scratch:resnet18", data, config())
