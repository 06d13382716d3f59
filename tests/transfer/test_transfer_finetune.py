"""Fine-tuning: it learns, repeats itself, leaves what is frozen alone, and its records are complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutline.config import load as load_config
from cutline.errors import ConfigError, DataError, TrainingError
from cutline.record import Result, check_comparable
from cutline.train.optim import param_groups
from cutline.transfer import finetune as loop
from cutline.transfer import segment as segmentation
from cutline.transfer.data import open_data
from cutline.transfer.depth import DepthConfig, counted, depth
from cutline.transfer.depth import fit as fit_depth
from cutline.transfer.options import look
from cutline.transfer.segment import SegmentConfig, Segmenter, cross_entropy, fit, score, segment
from cutline.transfer.store import load, save

Folder = Callable[..., Path]
QUICK: dict[str, Any] = {"steps": 6, "batch": 4, "scale": (1.0, 1.0), "lr": 1e-3}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_segmentation_overfits_eight_pictures(folder: Folder, encoder: Any, head: str) -> None:
    config = SegmentConfig(
        head=head, steps=200, batch=8, lr=5e-3, layer_decay=1.0, drop_path=0.0, weight_decay=0.0, flip=False,
        scale=(1.0, 1.0), split="train",
    )  # fmt: skip
    result = segment(encoder, f"folder:{folder()}", config)
    # A head works on cells of 4 or 8 pixels, and the boxes' edges lie anywhere.
    assert result.metrics["miou"] > (0.94 if head == "upernet" else 0.6)
    assert result.metrics["accuracy"] > (0.97 if head == "upernet" else 0.85)


def test_depth_overfits_eight_pictures(folder: Folder, encoder: Any) -> None:
    config = DepthConfig(
        steps=150, batch=8, lr=5e-3, layer_decay=1.0, drop_path=0.0, weight_decay=0.0, flip=False, channels=16,
        split="train", max_depth=7,
    )  # fmt: skip
    metrics = depth(encoder, f"folder:{folder()}", config).metrics
    assert metrics["rmse"] < 0.2
    assert metrics["delta1"] > 0.99


@pytest.mark.parametrize("options", [{}, {"frozen": True, "head": "linear"}], ids=["fine-tuned", "frozen"])
def test_the_same_seed_gives_the_same_model_and_another_does_not(folder: Folder, encoder: Any, options: Any) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    config = SegmentConfig(**{**QUICK, "scale": (0.5, 2.0), **options}, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit(encoder, data, config)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used"
    torch.manual_seed(2)
    two = fit(encoder, data, config)
    assert same(weights(one), weights(two))
    assert score(one, data).metrics == score(two, data).metrics
    other = fit(encoder, data, config.model_copy(update={"seed": 4}))
    assert not same(weights(one), weights(other))


def test_a_scratch_encoder_follows_from_the_seed(folder: Folder) -> None:
    config = SegmentConfig(**{**QUICK, "steps": 1}, head="linear", seed=5)
    one, two = (fit("scratch:vit-tiny-64", f"folder:{folder()}", config) for _ in range(2))
    assert one.source_hash == two.source_hash
    assert same(weights(one), weights(two))


def test_half_precision_learns_like_single(folder: Folder, encoder: Any) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    options: dict[str, Any] = {**QUICK, "steps": 30, "split": "train", "frozen": True}
    full = score(fit(encoder, data, SegmentConfig(**options)), data)
    half = score(fit(encoder, data, SegmentConfig(**options, precision="bf16")), data)
    assert half.metrics["accuracy"] == pytest.approx(full.metrics["accuracy"], abs=0.05)
    assert half.metrics != full.metrics


def test_a_frozen_encoder_stays_as_it_is_to_the_bit(folder: Folder, encoder: Any) -> None:
    before = weights(encoder)
    frozen = fit(encoder, f"folder:{folder()}", SegmentConfig(**QUICK, frozen=True, head="upernet"))
    assert same(weights(frozen.encoder), before)
    tuned = fit(encoder, f"folder:{folder()}", SegmentConfig(**QUICK))
    assert not same(weights(tuned.encoder), before)
    assert same(weights(encoder), before), "the encoder given was trained"
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("flip", [True, False])
def test_kept_frozen_features_train_the_same_head(
    folder: Folder, encoder: Any, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(train=12, size=(30, 44))  # no multiple of the patch
    Image.fromarray(np.full((30, 44), 77, np.uint8)).save(root / "train/masks/005.png")  # no such class
    data, config = open_data(f"folder:{root}", "segment"), SegmentConfig(**QUICK, frozen=True, head="linear", flip=flip)
    kept = fit(encoder, data, config)
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    computed = fit(encoder, data, config)
    assert (kept.labels, kept.skipped) == (computed.labels, computed.skipped) == (11, 1)
    for (name, a), b in zip(kept.state_dict().items(), computed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-5), name


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_kept_class_tokens_train_the_same_head(
    folder: Folder, encoder: Any, head: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = open_data(f"folder:{folder()}", "depth")
    config = DepthConfig(**QUICK, frozen=True, head=head, class_token=True, gradient=0.5, max_depth=7)
    kept = fit_depth(encoder, data, config)
    monkeypatch.setattr(loop, "CACHE_BYTES", 0)
    for (name, a), b in zip(kept.state_dict().items(), fit_depth(encoder, data, config).state_dict().values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), name
    without = fit_depth(encoder, data, config.model_copy(update={"gradient": 0.0}))
    assert not same(weights(without.head), weights(kept.head))
    image = data.split("val").read(0).image
    assert np.array_equal(load(save(kept, tmp_path / "model")).predict([image])[0], kept.predict([image])[0])


def test_layer_decay_by_formula(encoder: Any) -> None:
    model = Segmenter(encoder, SegmentConfig(channels=64), ["a", "b"])
    groups = param_groups(model, 1e-3, 0.05, 0.5, model.layer_of, model.num_layers)
    rate = {name: g["lr"] for g in groups for name in g["names"]}
    decay = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert encoder.num_layers == 2
    assert rate["encoder.visual.conv1.weight"] == pytest.approx(1e-3 * 0.5**3)
    assert rate["encoder.visual.transformer.resblocks.0.mlp.c_fc.weight"] == pytest.approx(1e-3 * 0.5**2)
    assert rate["encoder.visual.transformer.resblocks.1.mlp.c_fc.weight"] == pytest.approx(1e-3 * 0.5)
    assert rate["pyramid.levels.0.1.weight"] == rate["head.classifier.weight"] == pytest.approx(1e-3)
    assert decay["head.classifier.weight"] == 0.05
    assert decay["head.classifier.bias"] == decay["encoder.visual.positional_embedding"] == 0


def test_drop_path_is_on_in_training_and_off_after(
    folder: Folder, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    kind = type(encoder)
    original = kind.set_drop_path
    monkeypatch.setattr(kind, "set_drop_path", lambda self, rate: (rates.append(rate), original(self, rate))[0])
    fit(encoder, f"folder:{folder()}", SegmentConfig(**QUICK, drop_path=0.3))
    assert rates == [0.3, 0.0]


def test_cross_entropy_is_the_mean_over_labelled_pixels() -> None:
    logits, target = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(-1, 3, (2, 4, 5))
    plain = [-torch.log_softmax(logits[b, :, y, x], 0)[target[b, y, x]] for b, y, x in (target >= 0).nonzero().tolist()]
    assert cross_entropy(logits, target).item() == pytest.approx(torch.stack(plain).mean().item(), rel=1e-5)
    nothing = cross_entropy(logits, torch.full_like(target, -1))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_single_losses_that_are_not_finite_are_skipped_and_a_run_of_them_stops(
    folder: Folder, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = open_data(f"folder:{folder()}", "segment"), []

    def sometimes(bad: range) -> Callable[..., torch.Tensor]:
        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return cross_entropy(logits, target) * (float("nan") if len(calls) in bad else 1)

        return loss

    monkeypatch.setattr(segmentation, "cross_entropy", sometimes(range(2, 4)))
    model = fit(encoder, data, SegmentConfig(**QUICK), tmp_path / "a")
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [1, 2]
    calls.clear()
    monkeypatch.setattr(segmentation, "cross_entropy", sometimes(range(1, 99)))
    with pytest.raises(TrainingError, match=r"5 times in a row, at step 4 with the pictures 00\d"):
        fit(encoder, data, SegmentConfig(**QUICK))


def test_segment_writes_result_model_log_and_grid(folder: Folder, encoder: Any, tmp_path: Path) -> None:
    out, spec = tmp_path / "out", f"folder:{folder()}"
    result = segment(encoder, spec, SegmentConfig(**QUICK, labels=5), out)
    assert Result.read(out) == result
    p = result.protocol
    assert (p.task, p.data, p.split, p.encoder_hash) == ("segment", spec, "val", encoder.hash)
    assert p.data_fingerprint == open_data(spec, "segment").fingerprint
    assert p.settings["crop"] == [32, 32]
    assert {k: p.settings[k] for k in ("head", "labels", "trained", "scored", "skipped", "steps")} == {
        "head": "upernet", "labels": 5, "trained": 5, "scored": 4, "skipped": 0, "steps": 6,
    }  # fmt: skip
    assert set(result.per_class["iou"]) <= {"ground", "red", "blue"}
    with Image.open(out / "samples.png") as grid:
        assert grid.width > 4 * 200
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [0, 5]
    data = open_data(spec, "segment")
    images = [data.splits["val"].read(i).image for i in range(3)]
    loaded = load(out)
    again = fit(encoder, spec, SegmentConfig(**QUICK, labels=5))
    for a, b in zip(loaded.predict(images), again.predict(images), strict=True):
        assert a.shape == (32, 32)
        assert (a == b).all()
    assert score(loaded, spec).model_dump(exclude={"seconds"}) == result.model_dump(exclude={"seconds"})


def test_depth_writes_a_model_that_predicts_alike(folder: Folder, encoder: Any, tmp_path: Path) -> None:
    data = open_data(f"folder:{folder(size=(30, 44))}", "depth")
    config = DepthConfig(steps=4, batch=4, channels=8, deconvolutions=1, max_depth=7)
    result = depth(encoder, data, config, tmp_path / "out")
    images = [data.splits["val"].read(i).image for i in range(2)]
    metres = load(tmp_path / "out/model").predict(images)
    assert metres[0].shape == (30, 44)
    assert metres[0].dtype == np.float32
    assert 0 < metres[0].min() <= metres[0].max() <= 7
    assert np.array_equal(metres[1], fit_depth(encoder, data, config).predict(images)[1])
    assert result.protocol.settings["average"] == "pictures"
    assert result.protocol.settings["max_depth"] == 7


def test_results_of_different_encoders_share_a_column_and_those_of_different_heads_do_not(
    folder: Folder, encoder: Any, make_encoder: Any
) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    one = segment(encoder, data, SegmentConfig(**QUICK, head="linear"))
    two = segment(make_encoder(patch=16), data, SegmentConfig(**QUICK, head="linear", seed=1))
    check_comparable([one, two])
    three = segment(encoder, data, SegmentConfig(**QUICK, head="linear", frozen=True))
    with pytest.raises(DataError, match="frozen"):
        check_comparable([one, three])


def test_what_cannot_be_scored_is_told_before_training(folder: Folder, encoder: Any, tmp_path: Path) -> None:
    data = open_data(f"folder:{folder()}", "segment")
    with pytest.raises(DataError, match="no split 'test'"):
        segment(encoder, data, SegmentConfig(**QUICK, split="test"), tmp_path / "out")
    with pytest.raises(ConfigError, match="stride=40 is larger"):
        segment(encoder, data, SegmentConfig(**QUICK, test="slide", stride=40), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_told(folder: Folder, encoder: Any) -> None:
    with pytest.raises(ConfigError, match="device='cuda' is not there: .* Use auto or cpu"):
        segment(encoder, f"folder:{folder()}", SegmentConfig(**QUICK, device="cuda"))


def test_a_model_outlives_pictures_that_cannot_be_scored(folder: Folder, encoder: Any, tmp_path: Path) -> None:
    root = folder()
    (root / "val/masks/000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="1 of 4 pictures skipped"):
        segment(encoder, f"folder:{root}", SegmentConfig(**QUICK), tmp_path / "out")
    assert load(tmp_path / "out").labels == 8


def test_scores_of_single_and_half_precision_do_not_share_a_column(folder: Folder, encoder: Any) -> None:
    data, options = open_data(f"folder:{folder()}", "segment"), {**QUICK, "head": "linear", "device": "cpu"}
    auto, single, half = (
        segment(encoder, data, SegmentConfig(**options, precision=p)) for p in ("auto", "fp32", "bf16")
    )
    assert auto.protocol.settings["precision"] == "fp32"
    check_comparable([auto, single])
    with pytest.raises(DataError, match="precision"):
        check_comparable([auto, half])


def test_an_encoder_whose_patch_does_not_divide_the_picture(folder: Folder, make_encoder: Any) -> None:
    data = open_data(f"folder:{folder(size=(33, 45))}", "segment")
    model = fit(make_encoder(patch=14, size=28), data, SegmentConfig(**{**QUICK, "steps": 2}))
    assert score(model, data).metrics["accuracy"] >= 0
    assert model.predict([data.splits["val"].read(0).image])[0].shape == (33, 45)


def test_pictures_of_different_sizes_train_and_score_together(folder: Folder, encoder: Any) -> None:
    root = folder(train=3, val=1)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            with Image.open(root / split / kind / "000.png") as picture:
                picture.resize((70, 41), Image.Resampling.NEAREST).save(root / split / kind / "big.png")
    config = SegmentConfig(**{**QUICK, "scale": (0.5, 2.0), "steps": 3})
    result = segment(encoder, f"folder:{root}", config)
    assert result.protocol.settings["crop"] == [32, 32]
    assert result.protocol.settings["scored"] == 2
    slid = segment(
        encoder, f"folder:{root}", config.model_copy(update={"test": "slide", "test_flip": True, "short": 40})
    )
    assert slid.protocol.settings["crop"] == [40, 40]


def test_eval_crops_are_those_of_the_benchmarks() -> None:
    everything = torch.ones(480, 640)
    eigen = counted(everything, DepthConfig(eval_crop="eigen"))
    assert eigen.sum() == (471 - 45) * (601 - 41)
    assert eigen[45, 41]
    assert not eigen[44, 41]
    garg = counted(torch.ones(375, 1242), DepthConfig(eval_crop="garg", max_depth=80))
    rows, columns = garg.any(1).nonzero().flatten(), garg.any(0).nonzero().flatten()
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (153, 371, 44, 1197)  # Eigen et al.'s own code
    with pytest.raises(DataError, match="480x640"):
        counted(torch.ones(100, 100), DepthConfig(eval_crop="eigen"))
    capped = counted(torch.tensor([[0.0, 0.0005, 1.0, 10.0, 10.1]]), DepthConfig())
    assert capped.tolist() == [[False, False, True, True, False]]


def test_depth_in_the_wrong_unit_is_told_and_out_of_range_refused(
    folder: Folder, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder()
    config = DepthConfig(steps=1, batch=2, channels=8, deconvolutions=0)
    with pytest.raises(DataError, match=r"no reading between 0.001 and 10.0 m. The median is \S+ m. With"):
        fit_depth(encoder, f"folder:{root},scale=1", config)
    fit_depth(encoder, f"folder:{root},scale=1", config.model_copy(update={"max_depth": 1e5}))
    assert "multiplied by 0.001" in capsys.readouterr().err


def test_options_say_what_is_wrong_with_them() -> None:
    config = load_config(SegmentConfig, None, ["labels=0.1", "crop=48", "scale=[0.5,1]", "head=fpn"])
    assert (config.labels, config.crop, config.scale) == (0.1, (48, 48), (0.5, 1.0))
    assert load_config(SegmentConfig, None, ["labels=20"]).labels == 20
    with pytest.raises(ConfigError, match="did you mean 'layer_decay'"):
        load_config(SegmentConfig, None, ["layer_deca=1"])
    for wrong in ("labels=0", "labels=1.5", "scale=[2,1]", "batch=1", "crop=0"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            load_config(SegmentConfig, None, [wrong])
    with pytest.raises(ConfigError, match="pixels would be left out"):
        look(SegmentConfig(crop=(32, 32), test="slide", stride=40))
    with pytest.raises(ConfigError, match="max_depth"):
        load_config(DepthConfig, None, ["min_depth=20"])
