"""The training loop: exact resume, kills, losses that are not finite, the run directory, two processes, EMA."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from processes import on_two_processes, run_cutline, start

from cutline import objectives, towers
from cutline.config import dump
from cutline.errors import ConfigError, TrainingError
from cutline.pairs import Pairs
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.train import checkpoint, loop
from cutline.train.optim import param_groups, schedule, set_lr
from cutline.train.recipe import Recipe

TOWERS = {
    "custom": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1},
    }
}


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate({
        "name": "test",
        "data": {"pairs": "scenes:n=64,size=48,seed=1", "cache": True, "threads": 1, "text": {"columns": {"captions": 1}}},
        "towers": TOWERS,
        "objectives": {"contrastive": {}},
        "train": {"batch": 8, "samples": 96, "warmup": 2, "save_every": 4, "log_every": 1, "lr": 1e-3} | train,
    })  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({r["step"] for r in rows}) == len(rows)
    return {r["step"]: r["loss"] for r in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps."""
    return loop.train(recipe(), tmp_path_factory.mktemp("whole") / "run")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return towers.load(str(run)).state_dict()


def test_run_directory_holds_everything(whole):
    assert {p.name for p in whole.iterdir()} == {"recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "model"}
    assert [p.name for p in checkpoint.saved(whole / "checkpoints")] == ["step-00000008", "step-00000012"]
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert row.keys() >= {"loss", "contrastive/text", "grad_norm", "logit_scale", "images_per_second", "data_wait",
                          "peak_memory_gib", "lr", "skipped_steps"}  # fmt: skip
    assert row["samples"] == 96
    assert any(p.name.startswith("events") for p in (whole / "tensorboard").iterdir())


def test_model_opens_in_open_clip_with_equal_outputs(whole):
    ours = towers.load(str(whole))
    theirs = open_clip.create_model(f"local-dir:{whole / 'model'}").eval()
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours.encode_image(x), theirs.encode_image(x), rtol=1e-5, atol=1e-6)


def test_resume_gives_identical_losses_and_weights(whole, tmp_path, monkeypatch):
    """Stopped after step 7, so that three steps past the last checkpoint are done again."""
    real, calls = loop.train_step, []

    def stop_at_7(run, batch):
        if run.step == 7 and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        return real(run, batch)

    monkeypatch.setattr(loop, "train_step", stop_at_7)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(), tmp_path / "run")
    assert max(losses(tmp_path / "run")) == 7
    assert not (tmp_path / "run" / "model").exists()
    loop.train(recipe(), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def test_resume_with_a_parameter_that_never_has_a_gradient(tmp_path):
    """The logit bias of a SigLIP tower, under a contrastive loss."""
    values = recipe(samples=32).model_dump()
    values["towers"]["custom"]["init_logit_bias"] = -10.0
    biased = Recipe.model_validate(values)
    loop.train(biased, tmp_path / "run")
    run = loop.prepare(biased, tmp_path / "run", resume=True)
    assert run.step == 4
    assert run.trainee.model.logit_bias not in run.optimiser.state
    assert run.optimiser.state[run.trainee.model.logit_scale]["step"] == 4


def test_resume_after_sigkill_gives_identical_losses(whole, tmp_path):
    (tmp_path / "r.yaml").write_text(dump(recipe()))
    child = start("-m", "cutline.cli", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    deadline = time.monotonic() + 120
    while not checkpoint.saved(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    child.killed()
    done = run_cutline("train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=0)


def test_nan_losses_are_skipped_and_counted_and_leave_the_weights(tmp_path, monkeypatch):
    run = loop.prepare(recipe(), tmp_path / "run", resume=False)
    batch = next(run.stream.batches())
    before = {k: v.clone() for k, v in run.trainee.state_dict().items()}
    bad = batch.to(run.device)
    bad.views["image"] = bad.views["image"] * math.nan
    assert math.isnan(loop.train_step(run, bad)["loss"])
    assert run.bad == 1
    assert all(torch.equal(v, before[k]) for k, v in run.trainee.state_dict().items())
    loop.train_step(run, batch.to(run.device).__class__(**vars(bad)))
    with pytest.raises(TrainingError, match=rf"3 steps in a row.*step 0.*{batch.keys[0]}.*train.lr"):
        loop.train_step(run, bad)


def test_a_run_that_diverges_keeps_the_metrics_up_to_there(tmp_path):
    with pytest.raises(TrainingError, match="steps in a row"):
        loop.train(recipe(lr=1e30, warmup=0, log_every=1000), tmp_path / "run", show=False)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(line)["loss"])
    assert json.loads(line)["skipped_steps"] == 3


def test_towers_for_pictures_that_are_not_square_are_refused(tmp_path):
    plan = recipe().model_copy(deep=True)
    plan.towers.custom["vision_cfg"] |= {"image_size": [48, 96]}
    with pytest.raises(ConfigError, match="takes pictures of 48×96, and views of pictures are square"):
        loop.prepare(plan, tmp_path / "run", resume=False)


def test_a_bad_step_leaves_the_statistics_of_batch_norms(tmp_path):
    run = loop.prepare(recipe(), tmp_path / "run", resume=False)
    run.trainee.model.visual.conv1 = torch.nn.Sequential(run.trainee.model.visual.conv1, torch.nn.BatchNorm2d(32))
    batch = next(run.stream.batches())
    loop.train_step(run, batch)
    before = {k: v.clone() for k, v in run.trainee.named_buffers()}
    assert before["model.visual.conv1.1.num_batches_tracked"] == 1
    batch.views["image"] = batch.views["image"] * math.nan
    loop.train_step(run, batch)
    assert all(torch.equal(v, before[k]) for k, v in run.trainee.named_buffers())


def test_a_skipped_step_is_counted_and_leaves_the_means_of_the_log_as_they_are(tmp_path, monkeypatch):
    real = loop.train_step

    def one_bad(run, batch):
        if run.step == 1:
            batch.views["image"] = batch.views["image"] * math.nan
        return real(run, batch)

    monkeypatch.setattr(loop, "train_step", one_bad)
    loop.train(recipe(samples=32, log_every=4), tmp_path / "run")
    (row,) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["skipped_steps"] == 1
    assert all(math.isfinite(v) for v in row.values())
    assert row["images_per_second"] > 0
    assert 1 < row["loss"] < 4


def test_a_good_step_ends_the_row_of_bad_ones(tmp_path):
    run = loop.prepare(recipe(), tmp_path / "run", resume=False)
    good = next(run.stream.batches())
    bad = next(run.stream.batches())
    bad.views["image"] = bad.views["image"] * math.inf
    for batch in (bad, bad, good, bad, bad):
        loop.train_step(run, batch)
    assert (run.bad, run.bad_in_row) == (4, 2)


def test_the_warning_of_an_objective_is_shown_once_and_again_after_it_was_gone(tmp_path, monkeypatch, capsys):
    def after_step(self, model, step):
        self.warning = "" if step == 5 else "it has collapsed"

    monkeypatch.setattr(objectives.contrastive.Objective, "after_step", after_step)
    loop.train(recipe(), tmp_path / "run")
    assert [x for x in capsys.readouterr().err.splitlines() if "collapsed" in x] == [
        "step 1: it has collapsed",
        "step 7: it has collapsed",
    ]


def test_an_existing_run_is_not_overwritten(whole):
    with pytest.raises(ConfigError, match="already holds a run.*--resume"):
        loop.train(recipe(), whole)


def test_resume_with_another_recipe_is_refused(whole):
    with pytest.raises(ConfigError, match="recipe differs"):
        loop.train(recipe(lr=5e-4), whole, resume=True)


def test_full_disk_keeps_the_earlier_checkpoints(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, {"x": torch.ones(2)}, keep=2)

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(TrainingError, match="No space left.*--resume"):
        checkpoint.save(folder, 2, {"x": torch.zeros(2)}, keep=2)
    state = {"x": torch.zeros(2)}
    checkpoint.load(checkpoint.saved(folder)[-1], state)
    assert state["x"].tolist() == [1, 1]


@pytest.mark.parametrize("other", [{"x": torch.zeros(3)}, {"x": torch.zeros(2), "y": torch.zeros(1)}])
def test_a_checkpoint_that_does_not_fit_is_an_error_for_users(tmp_path, other):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(2)}, keep=2)
    with pytest.raises(TrainingError, match="step-00000001 does not fit this run"):
        checkpoint.load(path, other)


def test_ema_is_the_average_by_its_formula_and_is_what_is_saved(tmp_path):
    run = loop.prepare(recipe(ema=0.5, samples=24), tmp_path / "run", resume=False)
    name = "positional_embedding"
    average = None
    for batch in run.stream.batches(until=3):
        loop.train_step(run, batch)
        run.step += 1
        now = run.trainee.model.state_dict()[name].clone()
        average = now if average is None else 0.5 * average + 0.5 * now
    torch.testing.assert_close(run.average.module.state_dict()[name], average)
    mask = run.trainee.model.attn_mask  # no NaN of its -inf
    assert torch.equal(run.average.module.attn_mask, mask)
    loop.train(recipe(ema=0.5, samples=24), tmp_path / "saved")
    torch.testing.assert_close(weights(tmp_path / "saved")[name], average)


def test_logit_scale_never_passes_its_maximum(tmp_path):
    run = loop.prepare(recipe(max_logit_scale=14.3, lr=0.5, warmup=0, clip=None), tmp_path / "run", resume=False)
    for batch in run.stream.batches(until=4):
        assert loop.train_step(run, batch)["logit_scale"] <= 14.3 + 1e-4


def test_loss_falls_on_a_handful_of_scenes(tmp_path):
    small = recipe(samples=480, lr=3e-3)
    small.data.pairs = "scenes:n=8,size=48,seed=1"
    values = losses(loop.train(small, tmp_path / "run"))
    assert values[1] > math.log(8) - 0.3
    assert values[60] < 0.5 * values[1]


TWO = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from cutline.config import load
from cutline.train.recipe import Recipe
from cutline.train.loop import train
train(load(Recipe, sys.argv[1]), Path(sys.argv[2]), resume=len(sys.argv) > 3)
"""


def test_two_processes_train_like_one(tmp_path):
    """The same batches, losses and weights up to the order of float sums; and after a kill the same to the bit."""
    plain = recipe(samples=32, save_every=2, keep=9)
    (tmp_path / "r.yaml").write_text(dump(plain))
    on_two_processes(TWO, str(tmp_path / "r.yaml"), str(tmp_path / "two"), folder=tmp_path)
    one = loop.train(plain, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[name], rtol=1e-3, atol=2e-4)
    before, kept = losses(tmp_path / "two"), weights(tmp_path / "two")
    cut_off(tmp_path / "two", 1)
    on_two_processes(TWO, str(tmp_path / "r.yaml"), str(tmp_path / "two"), "resume", folder=tmp_path)
    assert losses(tmp_path / "two") == before
    assert all(torch.equal(v, kept[k]) for k, v in weights(tmp_path / "two").items())


def cut_off(run: Path, checkpoints: int) -> None:
    """As a kill would have left it: the first checkpoints, and no model."""
    shutil.rmtree(run / "model")
    for late in sorted((run / "checkpoints").iterdir())[checkpoints:]:
        shutil.rmtree(late)


def test_resume_restores_what_dropout_draws_from_and_the_average(tmp_path):
    dropping = recipe(samples=64, save_every=2, keep=9, ema=0.9)
    dropping.towers = dropping.towers.model_copy(deep=True)
    dropping.towers.custom["vision_cfg"]["patch_dropout"] = 0.5
    one = loop.train(dropping, tmp_path / "one")
    before, kept = losses(one), weights(one)
    cut_off(one, 1)
    torch.manual_seed(12345)
    loop.train(dropping, one, resume=True)
    assert losses(one) == before
    assert all(torch.equal(v, kept[k]) for k, v in weights(one).items())


def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    """The same rows; what dropout draws begins anew (there is none here)."""
    plain = recipe(samples=32)
    (tmp_path / "r.yaml").write_text(dump(plain))
    one = loop.train(plain, tmp_path / "one")
    shutil.copytree(one, tmp_path / "cut")
    cut_off(tmp_path / "cut", 1)
    on_two_processes(TWO, str(tmp_path / "r.yaml"), str(tmp_path / "cut"), "resume", folder=tmp_path)
    assert losses(tmp_path / "cut") == pytest.approx(losses(one), abs=1e-4)


def test_a_run_goes_on_after_a_column_was_added_to_its_table(tmp_path):
    write_pairs(parse_spec("scenes:n=16,size=48,seed=1"), tmp_path / "s.lance")
    plain = recipe(samples=64, save_every=2, keep=9)
    plain.data.pairs = str(tmp_path / "s.lance")
    one = loop.train(plain, tmp_path / "one")
    before = losses(one)
    cut_off(one, 1)
    table = Pairs.open(tmp_path / "s.lance").add_column("n", [1] * 16)
    loop.train(plain, one, resume=True)
    assert losses(one) == before
    table.drop("captions").add_column("captions", ["another"] * 16)
    shutil.rmtree(one / "model")
    with pytest.raises(ConfigError, match="another order of samples"):
        loop.train(plain, one, resume=True)


def test_schedule_by_hand():
    assert [schedule(s, 10, warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(7, 10, warmup=4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule(7, 10, 4, "poly", power=0.9) == pytest.approx(0.5**0.9)
    assert schedule(10, 10, 4, floor=0.1) == pytest.approx(0.1)
    assert schedule(9, 10, 4, "constant") == 1.0


def test_decay_groups_and_layer_rates():
    model = towers.build(towers.TowerConfig(**TOWERS))
    groups = param_groups(model, 1e-3, 0.2, 0.5, lambda name: 0 if "embed" in name else 2, num_layers=2)
    named = {n: g for g in groups for n in g["names"]}
    assert named["visual.positional_embedding"]["weight_decay"] == 0
    assert named["logit_scale"]["weight_decay"] == 0
    assert named["visual.transformer.resblocks.0.ln_1.weight"]["weight_decay"] == 0
    assert named["visual.transformer.resblocks.0.mlp.c_fc.weight"]["weight_decay"] == 0.2
    assert named["visual.transformer.resblocks.0.mlp.c_fc.weight"]["lr"] == pytest.approx(1e-3 * 0.5)
    assert named["visual.positional_embedding"]["lr"] == pytest.approx(1e-3 * 0.5**3)
    optimiser = torch.optim.AdamW(groups)
    set_lr(optimiser, 2e-3)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(2e-3 * optimiser.param_groups[0]["scale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"contrastve": {}}}, r"unknown key 'objectives.contrastve'.*did you mean 'contrastive'"),
        ({"objectives": {"contrastive": {"weigt": 1}}}, r"unknown key 'objectives.contrastive.weigt'.*'weight'"),
        ({"train": {"betas": [0.9, 1.5]}}, "train.betas.1.*less than 1"),
        ({"objectives": {"contrastive": {"weight": 0}}}, "no objective has a weight above 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    import yaml

    values = yaml.safe_load(dump(recipe())) | changes
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        loop.load(Recipe, tmp_path / "r.yaml")


def test_a_recipe_names_its_objectives_and_an_override_adds_to_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(dump(recipe()))
    assert list(loop.load(Recipe, path, ["objectives.silc={}"]).objective_configs()) == ["contrastive", "silc"]
    path.write_text("name: x\ndata: {pairs: 'scenes:n=8'}\ntowers: {model: vit-tiny-64}\n")
    with pytest.raises(ConfigError, match="objectives: Field required"):
        loop.load(Recipe, path)


def test_unknown_text_column_is_named(tmp_path):
    wrong = recipe()
    wrong.data.text.columns = {"captoins": 1.0}
    with pytest.raises(ConfigError, match="captoins"):
        loop.train(wrong, tmp_path / "run")


def test_batch_larger_than_the_data_says_so(tmp_path):
    with pytest.raises(ConfigError, match="train.batch"):
        loop.train(recipe(batch=128), tmp_path / "run")


def test_training_on_scenes_needs_no_lance(tmp_path):
    (tmp_path / "r.yaml").write_text(dump(recipe(samples=8)))
    code = (
        "import sys\nfrom pathlib import Path\nsys.modules['lance'] = None\n"  # any import of it would fail
        "from cutline.config import load\nfrom cutline.train.recipe import Recipe\nfrom cutline.train.loop import train\n"
        "train(load(Recipe, sys.argv[1]), Path(sys.argv[2]))\n"
    )
    (tmp_path / "code.py").write_text(code)
    done = start(str(tmp_path / "code.py"), str(tmp_path / "r.yaml"), str(tmp_path / "run")).ended(120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_plain_training(tmp_path):
    compiled = losses(loop.train(recipe(compile=True, samples=32), tmp_path / "compiled"))
    assert compiled == pytest.approx(losses(loop.train(recipe(samples=32), tmp_path / "plain")), abs=1e-4)
