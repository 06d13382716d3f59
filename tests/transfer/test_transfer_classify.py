"""Classification: every head learns, its formulas hold, views are cut right, records are complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classes_made import THINGS, pixels
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import run_cutline
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.transforms import v2

from cutline.config import load as load_config
from cutline.errors import ConfigError, DataError
from cutline.record import Result, check_comparable
from cutline.transfer import finetune as loop
from cutline.transfer.classify import Classifier, ClassifyConfig, classify, fit, score
from cutline.transfer.data import Sample, Split, labelled, open_data
from cutline.transfer.metrics import Hits
from cutline.transfer.probes import AttentiveProbe, NeighbourProbe
from cutline.transfer.store import load
from cutline.transfer.views import Square, Views, erased

QUICK: dict[str, Any] = {"steps": 8, "batch": 6, "lr": 3e-3, "layer_decay": 1.0}
Make = Callable[..., Path]


# Learning


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "cosine"}, {"head": "attentive"}, {"head": "attentive", "frozen": True}, {"head": "knn", "k": 1}],
    ids=["fine-tuned", "cosine fine-tuned", "attentive fine-tuned", "attentive probe", "knn"],
)
def test_eight_pictures_are_learnt_to_the_last(folders: Make, encoder: Any, options: Any) -> None:
    training = {} if options.get("head") == "knn" else {"steps": 60, "lr": 2e-3, "layer_decay": 1.0, "scale": (1, 1)}
    config = ClassifyConfig.model_validate({"labels": 8, "batch": 8, "split": "train", **training, **options})
    model = fit(encoder, f"imagefolder:{folders()}", config)
    split = open_data(f"imagefolder:{folders()}", "classify").split("train")
    shown = [split.read(i) for i in labelled(12, 8, 0, split.labels)]
    assert model.labels == 8
    assert model.predict([s.image for s in shown]) == [model.classes[int(s.target)] for s in shown]


def test_every_head_tells_pictures_it_has_not_seen(folders: Make, encoder: Any) -> None:
    data = open_data(f"imagefolder:{folders(train=16, val=8)}", "classify")
    training = {"steps": 60, "batch": 16, "lr": 3e-3, "layer_decay": 1.0}
    for options in (training, {**training, "frozen": True}, {**training, "frozen": True, "head": "attentive"},
                    {"head": "knn", "k": 5}):  # fmt: skip
        assert classify(encoder, data, ClassifyConfig(**options)).metrics["top1"] > 0.6, options


def test_the_same_seed_gives_the_same_model_and_leaves_the_encoder_alone(folders: Make, encoder: Any) -> None:
    data = open_data(f"imagefolder:{folders()}", "classify")
    before = encoder.hash
    config = ClassifyConfig(**QUICK, operations=2, drop_path=0.1)
    one, two = (fit(encoder, data, config).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = fit(encoder, data, config.model_copy(update={"seed": 1})).state_dict()
    assert not torch.equal(one["head.classifier.weight"], other["head.classifier.weight"])
    assert encoder.hash == before
    frozen = fit(encoder, data, ClassifyConfig(**QUICK, frozen=True))
    assert frozen.encoder.hash == before


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_kept_frozen_features_train_the_same_head(
    folders: Make, encoder: Any, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = open_data(f"imagefolder:{folders()}", "classify"), ClassifyConfig(**QUICK, frozen=True, head=head)
    kept = fit(encoder, data, config)
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    computed = fit(encoder, data, config)
    for (name, a), b in zip(kept.state_dict().items(), computed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), name


def test_layer_decay_reaches_the_encoder_and_not_the_head(folders: Make, encoder: Any) -> None:
    from cutline.train.optim import param_groups

    config = ClassifyConfig(size=32, short=32)
    model = Classifier(encoder, config, ["a", "b"])
    groups = param_groups(model, 6e-4, 0.05, config.layer_decay, model.layer_of, model.num_layers)
    rate = {name: group["lr"] for group in groups for name in group["names"]}
    assert rate["head.classifier.weight"] == pytest.approx(6e-4)
    assert rate["encoder.visual.transformer.resblocks.1.mlp.c_fc.weight"] == pytest.approx(6e-4 * 0.6)
    assert rate["encoder.visual.conv1.weight"] == pytest.approx(6e-4 * 0.6**3)


# Formulas


def test_neighbours_vote_by_dinos_formula() -> None:
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 7, generator=g), torch.randn(5, 7, generator=g)
    labels = torch.randint(0, 6, (40,), generator=g)
    probe = NeighbourProbe(7, 6, 40, k=9, temperature=0.07)
    probe.fill(bank, labels)
    votes = probe([queries]).exp()
    for query, found in zip(queries, votes, strict=True):
        similar = [float(query @ b / (query.norm() * b.norm())) for b in bank]
        expected = np.zeros(6)
        for i in sorted(range(40), key=lambda i: -similar[i])[:9]:
            expected[labels[i]] += np.exp(similar[i] / 0.07)
        assert found.numpy() == pytest.approx(expected / expected.sum(), abs=1e-5)
    few = NeighbourProbe(7, 6, 3, k=20, temperature=0.07)  # fewer pictures than neighbours
    few.fill(bank[:3], labels[:3])
    assert few([queries]).exp().sum(1) == pytest.approx(torch.ones(5).numpy(), abs=1e-5)


def test_the_attentive_probe_pools_as_torchs_attention() -> None:
    torch.manual_seed(0)
    probe, x = AttentiveProbe(128, 5), torch.randn(3, 128, 4, 6)
    pool, peer = probe.pool, torch.nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        peer.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        peer.out_proj.weight.copy_(pool.proj.weight)
        peer.out_proj.bias.copy_(pool.proj.bias)
        cells = x.flatten(2).transpose(1, 2)
        pooled = peer(pool.latent.expand(3, -1, -1), cells, cells)[0][:, 0]
        pooled = pooled + pool.mlp(pool.norm(pooled))
        assert torch.allclose(probe([x]), probe.classifier(probe.norm(pooled)), atol=1e-5)


@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 2**31))
def test_accuracies_are_torchmetrics(classes: int, pictures: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(pictures, classes, generator=g)
    truth = torch.cat([torch.arange(classes), torch.randint(0, classes, (pictures,), generator=g)])
    scores = torch.cat([torch.randn(classes, classes, generator=g), scores])
    hits = Hits(classes)
    for part in (slice(0, 3), slice(3, None)):
        hits.update(scores[part], truth[part])
    found = hits.scores()
    assert found["top1"] == pytest.approx(multiclass_accuracy(scores, truth, classes, average="micro").item())
    assert found["mean_class"] == pytest.approx(multiclass_accuracy(scores, truth, classes, average="macro").item())
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        expected = multiclass_accuracy(scores, truth, classes, average="micro", top_k=5).item()
        assert found["top5"] == pytest.approx(expected)


def test_a_class_without_a_picture_does_not_count_in_the_mean() -> None:
    hits = Hits(3)
    hits.update(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([0, 1, 1]))
    assert hits.scores() == {"top1": pytest.approx(2 / 3), "mean_class": pytest.approx(0.75)}
    assert hits.accuracy()[2].isnan()


# Views


@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([(32, 32), (32, 37), (16, 18)]))
def test_the_test_view_is_torchvisions(height: int, width: int, sides: tuple[int, int]) -> None:
    image = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size, short = sides
    peer = v2.Compose([v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    expected = np.asarray(peer(Image.fromarray(image))).astype(int)
    found = Square(size, short)(image).astype(int)
    assert found.shape == (size, size, 3)
    assert np.abs(found - expected).mean() < 0.5  # of noise: Pillow rounds and clips between its two passes


def views(**options: Any) -> Views:
    def read(i: int) -> Sample:
        return Sample(str(i), pixels("apple", i), np.array(i))

    return Views(Split("train", list("01234567"), read), range(8), 4, 3, Square(32, 32), **options)


def test_a_training_view_depends_on_seed_and_step_alone() -> None:
    made = list(views(scale=(0.3, 1), flip=True, operations=2).iterate(0, 5))
    again = views(scale=(0.3, 1), flip=True, operations=2).make(3)
    assert torch.equal(made[3].images, again.images)
    assert made[3].targets.tolist() == [int(k) for k in again.keys]
    assert made[3].images.shape == (4, 3, 32, 32)
    assert not views(scale=(0.3, 1)).whole


def test_erasing_fills_a_rectangle_with_noise_of_the_given_colour() -> None:
    view, shares = np.full((3, 200, 200), 7, np.uint8), []
    for seed in range(40):
        found = erased(view, (0.2, 0.5, 0.8), (0.1, 0.05, 0.05), np.random.default_rng(seed))
        changed = (found != view).any(0)
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        inside = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 255
        shares.append(inside[0].size / changed.size)
        assert inside.mean((1, 2)) == pytest.approx([0.2, 0.5, 0.8], abs=0.02)
        assert inside.std((1, 2)) == pytest.approx([0.1, 0.05, 0.05], abs=0.02)
        assert changed.sum() > 0.98 * inside[0].size  # nothing outside it
    assert 0.02 <= min(shares) < 0.08
    assert 0.25 < max(shares) <= 0.34
    assert (view == 7).all()


def test_a_share_of_the_training_views_is_erased() -> None:
    plain, some = list(views().iterate(0, 40)), list(views(erase=0.25).iterate(0, 40))
    changed = [(a != b).any() for x, y in zip(plain, some) for a, b in zip(x.images, y.images)]
    assert 0.15 < np.mean(changed) < 0.35
    assert not views(erase=0.25).whole


def test_whole_views_are_the_test_view_or_its_mirror_image() -> None:
    whole = views(flip=True)
    assert whole.whole
    batch = whole.make(1)
    for image, row, flip in zip(batch.images, batch.rows.tolist(), batch.flips.tolist(), strict=True):
        still = torch.from_numpy(whole.picture(row)).permute(2, 0, 1)
        assert torch.equal(image, still.flip(2) if flip else still)


def test_a_random_crop_keeps_its_share_of_the_picture() -> None:
    """A ramp of columns tells the width of the crop, and of rows its height."""
    rows, columns = np.mgrid[0:200, 0:200]
    sample = Sample("0", np.stack([rows, columns, rows], 2).astype(np.uint8), np.array(0))
    cutter, rng = (
        Views(Split("train", ["0"], lambda i: sample), [0], 1, 0, Square(32, 32), (0.2, 0.5)),
        np.random.default_rng(0),
    )
    shares = []
    for _ in range(60):
        view = cutter.view(0, False, rng)[0].float()
        height, width = ((v.max() - v.min()) * 32 / 31 for v in (view[0].mean(1), view[1].mean(0)))
        shares.append(float(height * width) / 200**2)
    assert 0.17 < min(shares) < 0.26
    assert 0.44 < max(shares) < 0.53


# Records and the command


@pytest.mark.parametrize("head", ["linear", "attentive", "knn"])
def test_a_loaded_model_predicts_and_scores_alike(folders: Make, encoder: Any, head: Any, tmp_path: Path) -> None:
    spec = f"imagefolder:{folders()}"
    options = {} if head == "knn" else QUICK
    config, out = ClassifyConfig(**options, head=head, frozen=True), tmp_path / "out"
    result = classify(encoder, spec, config, out)
    model = load(out)
    assert score(model, spec).model_dump(exclude={"seconds"}) == result.model_dump(exclude={"seconds"})
    assert Result.read(out).metrics == result.metrics
    split = open_data(spec, "classify").split("val")
    images = [split.read(i).image for i in range(6)]
    assert set(model.predict(images)) <= set(THINGS)
    again = fit(encoder, spec, config)
    assert np.array_equal(model.probabilities(images), again.probabilities(images))
    assert model.probabilities(images).sum(1) == pytest.approx(np.ones(6), abs=1e-5)
    assert model.predict([]) == []
    with Image.open(out / "samples.png") as grid:
        shown = np.asarray(grid.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in THINGS.values():  # the pictures are there
        assert (np.abs(shown - colour).max(1) < 25).mean() > 0.005


def test_scores_of_different_heads_do_not_share_a_column(folders: Make, encoder: Any, make_encoder: Any) -> None:
    data = open_data(f"imagefolder:{folders()}", "classify")
    one = classify(encoder, data, ClassifyConfig(head="knn"))
    two = classify(make_encoder(patch=16), data, ClassifyConfig(head="knn", seed=1))
    check_comparable([one, two])
    assert one.protocol.settings["frozen"]
    with pytest.raises(DataError, match="head"):
        check_comparable([one, classify(encoder, data, ClassifyConfig(**QUICK, frozen=True))])


def test_options_that_would_be_ignored_or_cannot_work_are_refused(folders: Make, encoder: Any) -> None:
    config = load_config(ClassifyConfig, None, ["head=attentive", "scale=[0.2,1]", "labels=0.5"])
    assert (config.scale, config.labels) == ((0.2, 1.0), 0.5)
    for wrong, said in (
        (["head=knn", "lr=1"], "head=knn trains nothing: leave lr out"),
        (["k=5"], "head=linear has no neighbours: leave k out"),
        (["scale=[0.5,2]"], "range of shares"),
        (["head=mlp"], "head"),
        (["smooth=0.1"], "did you mean 'smoothing'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(ClassifyConfig, None, wrong)
    with pytest.raises(ConfigError, match="short=20 is less than size=32"):
        fit(encoder, f"imagefolder:{folders()}", ClassifyConfig(**QUICK, short=20))


def test_an_encoder_with_stages_of_its_own_is_classified_with(folders: Make) -> None:
    from cutline.towers.store import load_encoder

    torch.manual_seed(0)
    encoder = load_encoder("scratch:resnet10t")
    for head in ("linear", "attentive"):
        config = ClassifyConfig(head=head, steps=2, batch=4, size=64, short=70)
        model = fit(encoder, f"imagefolder:{folders()}", config)
        assert model.probabilities([pixels("sea", 1, (90, 50))]).shape == (1, 3)


def test_the_command_writes_scores_model_and_samples(folders: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run_cutline(
        "transfer", "classify", "--encoder", "scratch:vit-tiny-64", "--data", f"imagefolder:{folders()}",
        "--out", str(out), "frozen=true", "steps=3", "batch=4",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "top1" in ran.stdout
    assert json.loads((out / "result.json").read_text())["protocol"]["task"] == "classify"
    assert (out / "samples.png").exists()
