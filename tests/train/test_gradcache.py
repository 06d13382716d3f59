"""Gradient cache: micro-batches give the loss and the gradient of the whole batch, on one process and on two."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LEAVE, on_two_processes

sys.path.append(str(Path(__file__).parents[1] / "objectives"))
from objectives_made import recipe, rows_of, stopped_and_resumed

from cutline.config import dump
from cutline.errors import ConfigError
from cutline.objectives.base import Features
from cutline.train import gradcache, loop
from cutline.train.recipe import Recipe

SIZES = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
COMPARING: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "sigmoid": {"chunk": 3},
    "distill": {"teacher": "scratch:vit-tiny-64"},
    "nclip": SIZES,
    "supervised": {"labels": "objects", "field": "name", "classes": ["cat", "dog"]},
    "catlip": {"classes": ["cat", "dog", "grass"]},
    "experts": {"segment": {"column": "semantic", "classes": 103}},
}


def plan(texts: str = "all", **methods: Any) -> Recipe:
    return Recipe.model_validate(recipe({"columns": {"alt": 1, "captions": 1}, "rule": texts}, **methods))


def prepared(values: Recipe, out: Path) -> tuple[loop.Run, Any]:
    """A run in float64 and its first batch."""
    run = loop.prepare(values, out, resume=False)
    run.trainee.double()
    for online in getattr(run.trainee.methods().get("distill"), "online", ()):
        online.model.double()
    batch = next(iter(run.stream.batches(until=1)))
    batch.views = {k: v.double() for k, v in batch.views.items()}
    return run, batch


def gradients(run: loop.Run, batch: Any, rows: int | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """The loss and every gradient, by name."""
    run.trainee.zero_grad()
    torch.manual_seed(seed)
    if rows is None:
        loss, _ = run.trainee(batch)
        loss.backward()
    else:
        loss, _ = gradcache.backward(run.trainee, batch, rows, nullcontext)
    found = {n: p.grad.clone() for n, p in run.trainee.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("texts", ["sum", "all"])
@pytest.mark.parametrize("method", COMPARING)
def test_micro_batches_give_the_value_and_gradient_of_the_whole_batch(method, texts, tmp_path):
    """Micro-batches of 3 of 8 pictures, the last of 2."""
    run, batch = prepared(plan(texts, **{method: COMPARING[method]}), tmp_path / "run")
    whole, parts = (gradients(run, batch, rows) for rows in (None, 3))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


SILC = {**SIZES, "local_views": 2, "global_views": 2}


@pytest.mark.parametrize(
    "methods",
    [
        {"contrastive": {}},
        {"contrastive": {"views": ["image", "silc/global"]}, "silc": SILC},  # a pass after the decoder's
        {"experts": COMPARING["experts"]},
    ],
    ids=["one pass", "a second view", "dense maps"],
)
def test_a_decoder_that_reads_tokens_has_the_same_gradient(methods, tmp_path):
    values = recipe(**{"captioning": {}, **methods})
    values["towers"] = {"model": "coca-vit-tiny-64"}
    run, batch = prepared(Recipe.model_validate(values), tmp_path / "run")
    whole, parts = (gradients(run, batch, rows) for rows in (None, 3))
    for name, value in whole.items():  # positions of local crops are interpolated in float32
        torch.testing.assert_close(parts[name], value, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_objectives_that_pass_the_tower_see_one_micro_batch_after_the_other(tmp_path):
    """The gradient is the mean over pictures; the centre moves by the mean of all of them, once."""
    run, batch = prepared(plan("sum", contrastive={}, silc={**SIZES, "local_views": 2}), tmp_path / "run")
    prototypes = run.trainee.objectives["silc"].prototypes
    found = []
    for rows in (None, 3):
        found.append(gradients(run, batch, rows))
        prototypes.follow()  # of the student's own weights, which are the teacher's
        found[-1]["centre"] = prototypes.centre.clone()
        prototypes.centre.zero_()
    for name, value in found[0].items():  # positions of local crops are interpolated in float32
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert found[0]["centre"].abs().max() > 0


def test_collapse_is_judged_by_all_micro_batches(tmp_path):
    """Of eight pictures in parts of seven the last part has one, which tells nothing of how pictures differ."""
    mae = {"width": 16, "depth": 1, "heads": 2}
    run, batch = prepared(plan("sum", silc={**SIZES, "local_views": 2}, mae=mae), tmp_path / "run")
    gradients(run, batch, 7)
    silc, mae = (run.trainee.objectives[n].logged for n in ("silc", "mae"))
    assert silc["entropy/mean"] - silc["entropy/each"] > 0.01
    assert "explained" in mae


def test_random_numbers_are_replayed(tmp_path):
    """With patches dropped at random, one micro-batch of all pictures draws what the plain step draws, both times; and
    with parts the features that gave the loss are those whose activations are differentiated."""
    values = recipe(contrastive={})
    values["towers"]["custom"]["vision_cfg"]["patch_dropout"] = 0.5
    run, batch = prepared(Recipe.model_validate(values), tmp_path / "run")
    whole, cached, other = gradients(run, batch, None), gradients(run, batch, 8), gradients(run, batch, 8, seed=1)
    assert not torch.equal(whole["loss"], other["loss"])
    for name, value in whole.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    parts = gradients(run, batch, 3)

    def in_parts(tower, inputs):
        found = [tower(part) for part in inputs.split(3)]
        return {what: torch.cat([f[what] for f in found]) for what in found[0]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Features, "run", lambda self, tower, inputs: in_parts(tower, inputs))
        plain = gradients(run, batch, None)
    for name, value in plain.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_batch_norms_move_once_by_the_mean_of_the_micro_batches(tmp_path):
    values = recipe(contrastive={})
    values["towers"]["custom"] |= {"custom_text": True, "vision_cfg": {
        "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48}}  # fmt: skip
    run, batch = prepared(Recipe.model_validate(values), tmp_path / "run")
    start = {k: v.clone() for k, v in run.trainee.named_buffers()}
    floats = [k for k in start if "running_" in k]
    found = []
    for part in (batch, *(p for p, _ in gradcache.micro_batches(batch, 4))):
        run.trainee.load_state_dict(start, strict=False)
        run.trainee.model.encode_image(part.views["image"])
        found.append({k: v.clone() for k, v in run.trainee.named_buffers()})
    whole, first, second = found
    assert any(not torch.equal(start[k], whole[k]) for k in floats)
    for rows, expected in ((8, whole), (4, {k: (first[k] + second[k]) / 2 for k in floats})):
        run.trainee.load_state_dict(start, strict=False)
        gradients(run, batch, rows)
        now = dict(run.trainee.named_buffers())
        for k in floats:
            torch.testing.assert_close(now[k], expected[k])


def test_no_pass_sees_more_than_a_micro_batch(tmp_path, monkeypatch):
    run, batch = prepared(plan("sum", contrastive={}, masked=SIZES, distill=COMPARING["distill"]), tmp_path / "run")
    teacher = run.trainee.methods()["distill"].online[0].model
    seen, taught = [], []
    for tower, rows in ((run.trainee.model, seen), (teacher, taught)):
        tower.visual.conv1.register_forward_hook(lambda _, x, __, rows=rows: rows.append(len(x[0])))
    gradients(run, batch, 3)
    assert max(seen) == max(taught) == 3
    assert len(seen) == 3 * 3  # features, again with gradients, and the masked student (its teacher is another tower)


def test_bf16_micro_batches_keep_their_gradients(tmp_path):
    """Casts of weights that were made without gradients must not be used again in the pass with gradients."""
    found = []
    for rows in (None, 4):
        values = recipe(contrastive={})
        values["train"] |= {"precision": "bf16", "samples": 8, "micro_batch": rows}
        run = loop.prepare(Recipe.model_validate(values), tmp_path / f"run-{rows}", resume=False)
        found.append(loop.train_step(run, next(iter(run.stream.batches(until=1)))))
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-2)
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=5e-2)


def long(rows: int | None) -> Recipe:
    values = recipe({"columns": {"alt": 1, "captions": 1}, "rule": "all"}, contrastive={}, masked=SIZES)
    values["train"] |= {"samples": 64, "save_every": 3, "lr": 1e-3, "micro_batch": rows}
    values["towers"]["custom"]["vision_cfg"]["patch_dropout"] = 0.3
    return Recipe.model_validate(values)


def test_a_run_in_micro_batches_resumes_exactly(tmp_path):
    whole = loop.train(long(3), tmp_path / "whole", show=False)
    stopped_and_resumed(long(3), tmp_path / "run", 5)
    assert [r["loss"] for r in rows_of(tmp_path / "run")] == [r["loss"] for r in rows_of(whole)]


TRAIN = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from cutline.config import load
from cutline.train.recipe import Recipe
from cutline.train.loop import train
train(load(Recipe, sys.argv[1]), Path(sys.argv[2]), show=False)
"""


def test_two_processes_in_micro_batches_train_like_one_in_one(tmp_path):
    values = recipe({"columns": {"alt": 1, "captions": 1}, "rule": "all"}, contrastive={}, nclip=SIZES)
    values["train"] |= {"samples": 64, "lr": 1e-3}
    one = loop.train(Recipe.model_validate(values), tmp_path / "one", show=False)
    values["train"]["micro_batch"] = 3
    (tmp_path / "r.yaml").write_text(dump(Recipe.model_validate(values)))
    on_two_processes(TRAIN, str(tmp_path / "r.yaml"), str(tmp_path / "two"), folder=tmp_path)
    for a, b in zip(rows_of(one), rows_of(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "nclip/cross/text"):
            assert b[name] == pytest.approx(a[name], abs=2e-3)


CHANNELS_LAST = (
    LEAVE
    + """
import torch, torch.distributed as dist
from cutline.train.gradcache import average_gradients
dist.init_process_group("gloo")
layer = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
layer.extra = torch.nn.Parameter(torch.ones(2))
layer.unused = torch.nn.Parameter(torch.ones(2))
layer(torch.full((1, 4, 5, 5), 1.0 + dist.get_rank()).to(memory_format=torch.channels_last)).sum().backward()
if dist.get_rank():
    layer.extra.sum().backward()
mine = layer.weight.grad[0, 0, 0, 0].item()
average_gradients(layer)
assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)
print(mine, layer.weight.grad.mean().item(), layer.extra.grad.tolist(), layer.unused.grad)
leave()
"""
)


def test_gradients_of_channels_last_weights_are_averaged_and_unused_weights_have_none(tmp_path):
    outputs = on_two_processes(CHANNELS_LAST, folder=tmp_path)
    assert [o.split(" ", 1)[1].strip() for o in outputs] == ["13.5 [0.5, 0.5] None"] * 2
    assert [float(o.split()[0]) for o in outputs] == [9.0, 18.0]


def test_micro_batches_and_compile_are_refused_together():
    values = recipe(contrastive={})
    values["train"] |= {"micro_batch": 4, "compile": True}
    with pytest.raises((ConfigError, ValueError), match="do not go together"):
        Recipe.model_validate(values)


def test_features_that_no_objective_reads_cost_no_pass(tmp_path):
    run, batch = prepared(plan("sum", masked=SIZES), tmp_path / "run")
    features = gradcache.Cached(run.trainee.model, batch, None, 3, nullcontext)
    assert isinstance(features, Features)
    features.backward()
    assert all(p.grad is None for p in run.trainee.parameters())
