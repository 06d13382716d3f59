"""The loop of all tasks: exact resume, several processes, the weights' average, activations computed twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import LEAVE, on_two_processes
from torch.autograd.graph import saved_tensors_hooks

from cutline.config import check
from cutline.config import load as load_config
from cutline.errors import ConfigError, CutlineError, TrainingError
from cutline.record import Result
from cutline.towers.store import load_encoder
from cutline.transfer import batches, loop
from cutline.transfer.average_precision import AveragePrecision
from cutline.transfer.classify import ClassifyConfig, classify
from cutline.transfer.data import open_data
from cutline.transfer.depth import DepthConfig, depth
from cutline.transfer.detect import DetectConfig
from cutline.transfer.detect import fit as fit_objects
from cutline.transfer.metrics import Confusion, DepthErrors, Hits
from cutline.transfer.objects import Objects
from cutline.transfer.run import transfer
from cutline.transfer.segment import SegmentConfig, fit, segment
from cutline.transfer.store import load

QUICK: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-3}
DENSE: dict[str, Any] = {**QUICK, "channels": 64, "pyramid_channels": 32}


class Killed(Exception):
    pass


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets training die after so many steps of the optimiser; 0 lets it live again."""
    steps = {"left": 0}
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kw: Any) -> Any:
        steps["left"] -= 1
        if steps["left"] == 0:
            raise Killed
        return original(self, *args, **kw)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return lambda n: steps.update(left=n)


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("task", "config", "kind"),
    [
        (fit, SegmentConfig(**DENSE, head="fpn", ema=0.9), "folder"),
        (fit, SegmentConfig(**QUICK, head="linear", frozen=True, scale=(1, 1)), "folder"),
        (fit_objects, DetectConfig(**{**QUICK, "batch": 2}, channels=32), "scenes"),
    ],
    ids=["dropout, drop path and an average", "features kept", "detection"],
)
def test_resume_after_a_kill_gives_the_same_model_and_log(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, killed: Callable[[int], None], task: Any, config: Any,
    kind: str,
) -> None:  # fmt: skip
    data = f"folder:{folder()}" if kind == "folder" else "scenes:n=4,size=64,seed=1"
    config = config.model_copy(update={"save_every": 2})
    whole = task(encoder, data, config, tmp_path / "whole")
    killed(6)  # in the sixth step: four are saved
    with pytest.raises(Killed):
        task(encoder, data, config, tmp_path / "half")
    assert [p.name for p in (tmp_path / "half" / "checkpoints").iterdir()] == ["step-00000004"]
    killed(0)
    resumed = task(encoder, data, config, tmp_path / "half", resume=True)
    assert_same(whole, resumed)
    logs = [
        [json.loads(s) for s in (tmp_path / x / "metrics.jsonl").read_text().splitlines()] for x in ("whole", "half")
    ]
    assert [(r["step"], r["loss"], r["lr"]) for r in logs[0]] == [(r["step"], r["loss"], r["lr"]) for r in logs[1]]


def test_a_broken_picture_met_before_a_kill_is_counted_after_it(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, killed: Callable[[int], None], capsys: Any
) -> None:
    root, first = folder(train=12), np.random.default_rng([0, 1, 0]).permutation(12)[0]  # of the only epoch
    (root / f"train/images/{first:03d}.png").write_bytes(b"broken")
    config = SegmentConfig(**{**QUICK, "steps": 3}, head="linear", save_every=1)
    whole = fit(encoder, f"folder:{root}", config)
    killed(3)
    with pytest.raises(Killed):
        fit(encoder, f"folder:{root}", config, tmp_path / "half")
    killed(0)
    capsys.readouterr()
    resumed = fit(encoder, f"folder:{root}", config, tmp_path / "half", resume=True)
    assert_same(whole, resumed)
    assert (whole.labels, whole.skipped) == (resumed.labels, resumed.skipped) == (11, 1)
    assert "train: 1 of 12 pictures skipped (1 × picture broken)" in capsys.readouterr().err


def test_a_finished_run_keeps_no_checkpoint_and_a_changed_one_is_not_resumed(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, killed: Callable[[int], None]
) -> None:
    data, out, config = f"folder:{folder()}", tmp_path / "run", SegmentConfig(**QUICK, head="linear", save_every=2)
    killed(4)
    with pytest.raises(Killed):
        segment(encoder, data, config, out)
    killed(0)
    with pytest.raises(TrainingError, match="another config, encoder or data"):
        segment(encoder, data, config.model_copy(update={"lr": 2e-3}), out, resume=True)
    assert load_config(SegmentConfig, out / "recipe.yaml").lr == config.lr
    segment(encoder, data, config, out, resume=True)
    assert not (out / "checkpoints").exists()
    assert transfer("segment", encoder, data, config, out, resume=True) == Result.read(out)  # and trains nothing
    with pytest.raises(ConfigError, match="a finished run of another config, encoder or data"):
        transfer("segment", encoder, data, config.model_copy(update={"lr": 2e-3}), out, resume=True)
    killed(4)
    with pytest.raises(Killed):
        segment(encoder, data, config, out)
    assert not (out / "result.json").exists()  # the new run's, and nothing of the old one
    assert load_config(SegmentConfig, out / "recipe.yaml") == load(out).config


def test_the_average_of_the_weights_is_kept_by_formula(
    folder: Callable[..., Path], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step the average is the weights, then θ' ← d θ' + (1 - d) θ."""
    seen: list[dict[str, torch.Tensor]] = []
    original = loop._Run.step

    def step(self: Any, *args: Any) -> float:
        loss = original(self, *args)
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(loop._Run, "step", step)
    model = fit(encoder, f"folder:{folder()}", SegmentConfig(**QUICK, head="linear", ema=0.8))
    name = "head.classifier.weight"
    expected = seen[0][name]
    for state in seen[1:]:
        expected = 0.8 * expected + 0.2 * state[name]
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert not torch.allclose(expected, seen[-1][name])


def test_a_gradient_that_is_not_finite_leaves_weights_and_batch_norms_as_they_were(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = f"folder:{folder()}", SegmentConfig(**{**QUICK, "steps": 3}, head="linear", drop_path=0)
    original = torch.nn.utils.clip_grad_norm_
    norms = iter([1.0, float("nan"), 1.0])
    states = []

    def norm(parameters: Any, limit: float) -> torch.Tensor:
        return original(parameters, limit) * next(norms)

    step = loop._Run.step

    def watched(self: Any, *args: Any) -> float:
        loss = step(self, *args)
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", norm)
    monkeypatch.setattr(loop._Run, "step", watched)
    fit(encoder, data, config, tmp_path)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[1]["head.norm.running_mean"], states[2]["head.norm.running_mean"])
    assert "not finite" in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_keeps_five_checkpoints_and_one_at_its_end(
    folder: Callable[..., Path], encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop._Run, "save", lambda run: saved.append(run.done))
    fit(encoder, f"folder:{folder()}", SegmentConfig(**{**QUICK, "steps": 13}, head="linear"), tmp_path)
    assert saved == [3, 6, 9, 12, 13]


def test_batch_norms_of_several_gpus_keep_their_activations() -> None:
    encoder = load_encoder("scratch:mobilenetv3_small_050").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(images)[-1]
        assert torch.equal(loop.convert_sync_batchnorm(encoder)(images)[-1], before)


@pytest.mark.parametrize("name", ["scratch:vit-tiny-64", "scratch:vit_tiny_patch16_224", "scratch:convnext_atto"])
def test_activations_computed_twice_give_the_same_gradients_from_less_memory(name: str) -> None:
    encoder = load_encoder(name)
    images = torch.randn(2, 3, encoder.size, encoder.size)
    found = []
    for on in (False, True):
        encoder.set_grad_checkpointing(on)
        kept = [0]

        def pack(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += x.nbytes
            return x

        encoder.zero_grad()
        with saved_tensors_hooks(pack, lambda x: x):
            value = torch.stack([m.square().mean() for m in encoder(images)]).sum()
        value.backward()
        found.append((kept[0], {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}))
    assert found[1][0] < 0.6 * found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_gradient_checkpointing_while_training_alone_and_refused_where_a_tower_has_none(
    folder: Callable[..., Path], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"folder:{folder()}"
    config = SegmentConfig(**QUICK, head="linear", drop_path=0.2)
    plain = fit(encoder, data, config)
    twice = fit(encoder, data, config.model_copy(update={"grad_checkpointing": True}))
    assert_same(plain, twice)
    assert not twice.encoder.visual.transformer.grad_checkpointing
    monkeypatch.delattr(type(encoder.visual), "set_grad_checkpointing")
    with pytest.raises(CutlineError, match="leave grad_checkpointing out"):
        load_encoder("scratch:RN50").set_grad_checkpointing(True)
    with pytest.raises(CutlineError, match="leave grad_checkpointing out"):
        fit(encoder, data, config.model_copy(update={"grad_checkpointing": True}))


TWO = (
    LEAVE
    + """
import sys, json
import numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
from cutline.transfer.classify import ClassifyConfig, classify
from cutline.transfer.store import save
import test_transfer_loop as here
out = Path(sys.argv[2])
result = classify(torch.load(sys.argv[3], weights_only=False), f"imagefolder:{sys.argv[1]}", here.PLAIN, out)
assert json.loads((out / "result.json").read_text())["metrics"] == result.metrics
import os
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=int(os.environ["RANK"]), world_size=2)
rank = int(os.environ["RANK"])
for metric, add, parts in here.metrics():
    for part in parts[:2] if rank == 0 else parts[2:]:
        add(metric, part)
    metric.join()
    print(json.dumps(metric.scores()), flush=True)
leave()
"""
)
PLAIN = ClassifyConfig(**{**QUICK, "steps": 8}, scale=(0.5, 1.0), weight_decay=0.01, clip=1.0)


def metrics() -> list[tuple[Any, Callable[[Any, Any], None], list[Any]]]:
    """Every metric, how to add a picture to it, and three pictures."""
    rng = np.random.default_rng(0)
    maps = [
        (torch.from_numpy(rng.integers(0, 3, (5, 6))), torch.from_numpy(rng.integers(-1, 3, (5, 6)))) for _ in range(3)
    ]
    depths = [tuple(torch.from_numpy(rng.uniform(1, 5, (4, 4))) for _ in range(2)) for _ in range(3)]
    classes = [(torch.from_numpy(rng.normal(size=(4, 7))), torch.from_numpy(rng.integers(0, 7, 4))) for _ in range(3)]
    objects = []
    for i in range(3):
        corner = rng.uniform(0, 20, (i + 1, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 20, (i + 1, 2))]).astype(np.float32)
        truth = Objects(boxes, np.arange(i + 1) % 2, np.zeros(i + 1, bool), (boxes[:, 2:] - boxes[:, :2]).prod(1), None)
        found = {"boxes": boxes + 1, "labels": np.arange(i + 1) % 2, "scores": rng.uniform(0, 1, i + 1)}
        objects.append((truth, found))
    return [
        (Confusion(3), lambda m, p: m.update(*p), maps),
        (DepthErrors(), lambda m, p: m.update(*p, p[1] > 1.5), depths),
        (Hits(7), lambda m, p: m.update(*p), classes),
        (AveragePrecision(["a", "b"], False), lambda m, p: m.update(*p), objects),
    ]


def test_two_processes_train_and_score_as_one(
    folders: Callable[..., Path], encoder: Any, tmp_path: Path, capfd: Any
) -> None:
    data = folders()
    (data / "train/sea/1.jpg").write_bytes(b"broken")
    alone = classify(encoder, f"imagefolder:{data}", PLAIN, tmp_path / "one")
    torch.save(encoder, tmp_path / "encoder.pt")
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n" + TWO
    lines = on_two_processes(
        code, str(data), str(tmp_path / "two"), str(tmp_path / "encoder.pt"), str(tmp_path / "store"), folder=tmp_path
    )
    joint = Result.read(tmp_path / "two")
    assert joint.metrics == pytest.approx(alone.metrics)
    assert joint.protocol.column() == alone.protocol.column()
    assert joint.protocol.settings["trained_skipped"] == 1
    one, two = (load(tmp_path / x) for x in ("one", "two"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)
    expected = []
    for metric, add, parts in metrics():
        for part in parts:
            add(metric, part)
        expected.append(metric.scores())
    for rank in lines:
        found = [json.loads(line) for line in rank.splitlines() if line.startswith("{")]
        assert len(found) == 4
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b)


def test_a_batch_that_the_processes_cannot_share_is_told(
    folder: Callable[..., Path], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "world", lambda: (0, 3))
    with pytest.raises(ConfigError, match="batch=4 is not a multiple of the 3 processes"):
        fit(encoder, f"folder:{folder()}", SegmentConfig(**DENSE))


def test_processes_shares_make_up_the_batch(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_data(f"folder:{folder()}", "segment").split("train")
    made = batches.Batches(split, range(len(split)), 4, 3, batches.Cut((24, 24), (0.5, 2.0), True, None, (0, 0, 0), -1))
    whole = made.make(5)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(batches, "world", lambda rank=rank: (rank, 2))
        parts.append(made.make(5))
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
    assert [k for p in parts for k in p.keys] == whole.keys


def test_the_protocol_keeps_options_of_the_data_apart_from_those_of_the_run(
    folder: Callable[..., Path], encoder: Any
) -> None:
    """Both have a `scale`: metres of a stored unit, and the range of random enlargement."""
    config = DepthConfig(**QUICK, channels=64, scale=(0.8, 1.25))
    settings = depth(encoder, f"folder:{folder()},scale=0.001", config).protocol.settings
    assert settings["scale"] == [0.8, 1.25]
    assert settings["data"] == {"scale": 0.001}


@pytest.mark.parametrize("option", [{"grad_checkpointing": True}, {"layer_decay": 0.8}, {"drop_path": 0.2}])
def test_an_option_that_a_frozen_encoder_would_ignore_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"a frozen encoder is not trained: leave {next(iter(option))}"):
        check(SegmentConfig, {"frozen": True, **option})
    check(SegmentConfig, {"frozen": True, "layer_decay": 1, "drop_path": 0})  # which say the same
