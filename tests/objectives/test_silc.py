"""SILC: its formula on whole towers, its views, towers of every kind, and training on scenes."""

import math

import pytest
import torch
import torch.nn.functional as F
from objectives_made import recipe, rows_of
from torch import Tensor

from cutline import config, towers
from cutline.errors import ConfigError
from cutline.objectives import base, contrastive, sigmoid, silc
from cutline.objectives.silc import GLOBAL, LOCAL, Config, Objective
from cutline.train import loop
from cutline.train.recipe import Recipe

SMALL = {"prototypes": 64, "hidden": 64, "bottleneck": 32}


def made(custom: dict | None = None, **options: object) -> tuple[towers.Model, Objective]:
    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig(custom=custom or recipe()["towers"]["custom"]))
    return model, Objective(Config.model_validate(SMALL | options), model)


def batch(pictures: int, views: int, local: int, size: int = 48, count: int = 1) -> base.Batch:
    torch.manual_seed(1)
    pixels = {"image": torch.randn(pictures, 3, size, size), LOCAL: torch.randn(pictures * views, 3, local, local)}
    if count > 1:
        pixels[GLOBAL] = torch.randn(pictures * (count - 1), 3, size, size)
    return base.Batch({k: v.double() for k, v in pixels.items()}, {})


def plain(model: towers.Model, objective: Objective, views: dict[str, Tensor], pictures: int) -> Tensor:
    """The mean over pictures and pairs of views, a pair at a time; tower and heads as they are at the start."""
    head, encoder = objective.prototypes.student, towers.load_encoder(model)

    def logits(images: Tensor) -> Tensor:
        return F.normalize(head.mlp(encoder.pooled(images)), dim=-1) @ F.normalize(head.last.weight, dim=-1).T

    total, pairs = torch.zeros((), dtype=torch.float64), 0
    further, local = views[GLOBAL], views[LOCAL]
    for i in range(pictures):
        for g in (views["image"][i], *further[i * 2 : i * 2 + 2]):
            target = (logits(g[None])[0] / 0.04).softmax(0).detach()
            for crop in local[i * 3 : i * 3 + 3]:
                total = total - (target * (logits(crop[None])[0] / 0.1).log_softmax(0)).sum()
                pairs += 1
    return total / pairs


def test_value_and_gradients_equal_the_formula_with_several_global_views():
    model, objective = made(local_views=3, global_views=3)
    model, objective = model.double(), objective.double()
    whole = batch(4, views=3, local=32, count=3)
    found = []
    for loss in (
        lambda: objective(whole, base.Features(model, whole))["local"],
        lambda: plain(model, objective, whole.views, 4),
    ):
        model.zero_grad()
        objective.zero_grad()
        value = loss()
        value.backward()
        parameters = [*model.visual.named_parameters(), *objective.prototypes.student.named_parameters()]
        found.append({"value": value.detach()} | {n: p.grad for n, p in parameters})
    for name, ours in found[0].items():
        atol = 1e-7 if name == "positional_embedding" else 1e-12  # it is interpolated in float32
        torch.testing.assert_close(ours, found[1][name], rtol=1e-7, atol=atol)


@pytest.mark.parametrize(("size", "patch", "local"), [(224, 16, 96), (224, 14, 98), (64, 8, 32), (48, 16, 32)])
def test_local_crops_are_three_sevenths_of_the_picture_in_whole_patches(size, patch, local):
    custom = recipe()["towers"]["custom"]
    vision = custom["vision_cfg"] | {"image_size": size, "patch_size": patch}
    _, objective = made(custom | {"vision_cfg": vision})
    assert objective.views() == {LOCAL: base.View(size=local, count=8, scale=(0.05, 0.4))}


def test_the_text_is_compared_with_both_global_crops():
    model, _ = made(global_views=2, local_views=1)
    whole = batch(4, views=1, local=16, count=2)
    model = model.double()
    whole.texts["text"] = base.Texts(torch.randint(1, 400, (4, 24)), torch.arange(4))
    views = ["image", GLOBAL]
    both = contrastive.Objective(contrastive.Config(views=views), model)
    found = both(whole, base.Features(model, whole))["text"]
    text = model.encode_text(whole.texts["text"].tokens, normalize=True)
    each = []
    for view in ("image", GLOBAL):
        logits = model.logit_scale.exp() * model.encode_image(whole.views[view], normalize=True) @ text.T
        each.append((F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2)
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    pairwise = sigmoid.Objective(sigmoid.Config(views=views), model)
    found, each = pairwise(whole, base.Features(model, whole))["text"], []
    sign = 2 * torch.eye(4, dtype=torch.float64) - 1
    for view in views:
        x = model.logit_scale.exp() * model.encode_image(whole.views[view], normalize=True) @ text.T + model.logit_bias
        each.append(-torch.log(1 / (1 + torch.exp(-sign * x))).sum() / 4)
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    for view, views in ((LOCAL, 3), ("silc/globl", 1)):
        named = contrastive.Objective(contrastive.Config(views=["image", view]), model)
        wrong = batch(4, views=views, local=16)
        wrong.texts = whole.texts
        with pytest.raises(ConfigError, match=f"views names '{view}', which is no view with one crop of each picture"):
            named(wrong, base.Features(model, wrong))


def test_further_global_views_are_of_the_towers_own_size():
    _, objective = made(global_views=2, local_views=4, local_size=16, local_scale=(0.1, 0.3))
    assert objective.views() == {
        LOCAL: base.View(size=16, count=4, scale=(0.1, 0.3)),
        GLOBAL: base.View(size=None, count=1, scale=(0.4, 1.0)),
    }


@pytest.mark.parametrize("scale", [[5, 40], [0, 0], [-0.1, 0.4], [math.nan, 1]])
@pytest.mark.parametrize("which", ["local_scale", "global_scale"])
def test_a_scale_that_is_no_share_of_the_picture_is_refused(which, scale):
    with pytest.raises(ConfigError, match=which):
        config.check(Recipe, recipe(silc={which: scale}))


def test_crops_smaller_than_a_patch_are_refused():
    with pytest.raises(ConfigError, match=r"silc.local_size=12 is no whole number of patches.*16"):
        made(local_size=12)


def test_a_convolutional_tower_trains_with_a_teacher_whose_statistics_follow(tmp_path):
    values = recipe(silc={**SMALL, "local_views": 2, "momentum": 0.5})
    values["towers"]["custom"]["vision_cfg"] = {
        "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}  # fmt: skip
    values["towers"]["custom"]["custom_text"] = True
    values["train"] |= {"samples": 16, "batch": 8}
    run = loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=False)
    objective = run.trainee.objectives["silc"]
    assert objective.views()[LOCAL].size == 32
    name = "trunk.conv1.1.running_mean"
    expected = run.trainee.model.visual.state_dict()[name].clone()
    for pictures in run.stream.batches(until=2):
        loop.train_step(run, pictures)
        run.step += 1
        expected = 0.5 * expected + 0.5 * run.trainee.model.visual.state_dict()[name]
    got = objective.tower.encoder.visual.state_dict()[name]
    torch.testing.assert_close(got, expected)
    assert got.abs().max() > 0


def test_it_trains_alone_without_texts(tmp_path):
    """In the end the student tells the pictures apart: its loss is below what it would be if it said the same of all."""
    values = recipe(silc={**SMALL, "local_views": 4})
    values["data"]["augment"] = {"scale": [0.4, 1.0]}
    values["train"] |= {"batch": 16, "samples": 64 * 16, "warmup": 8, "lr": 2e-3}
    rows = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "run", show=False))

    def mean(name: str, start: int, stop: int) -> float:
        return sum(r[f"silc/{name}"] for r in rows[start:stop]) / (stop - start)

    assert mean("local", 56, 64) < mean("local", 16, 24) - 0.3  # once the centre has found its place
    assert mean("local", 56, 64) < mean("entropy/mean", 56, 64) - 0.2
    assert mean("feature_std", 56, 64) > 2 * mean("feature_std", 0, 8)
    assert not any(k.startswith("contrastive") for k in rows[0])
    assert silc.Objective.needs_text is False
