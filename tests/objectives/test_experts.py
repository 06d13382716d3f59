"""Experts: each loss against its formula, one pass for embedding and map, two processes, training, recipes, errors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import recipe, rows_of
from processes import LEAVE, on_two_processes
from pydantic import ValidationError
from torch import Tensor

from cutline import towers
from cutline.config import check
from cutline.errors import ConfigError
from cutline.objectives import base
from cutline.objectives.experts import Config, Objective
from cutline.train import loop
from cutline.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SEGMENT = {"segment": {"column": "s", "classes": 5, "weight": 0.5}}
EXPERTS = {
    "segment": SEGMENT,
    "depth": {"depth": {"column": "d"}},
    "relative": {"depth": {"column": "d", "relative": True}},
    "normals": {"normals": {"column": "n", "weight": 2.0}},
    "all": SEGMENT | {"depth": {"column": "d"}, "normals": {"column": "n"}},
}


def made(custom: dict | None = None, **options: Any) -> tuple[towers.Model, Objective]:
    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig.model_validate({"custom": custom or recipe()["towers"]["custom"]})).double()
    return model, Objective(Config.model_validate(options), model).double()


def batch_of(first: int = 0, last: int = 4, size: int = 12) -> base.Batch:
    """Pictures first … last − 1 of four, with labels of which some are missing; picture 1 has none at all."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 48, 48, generator=draw).double()
    ids = torch.randint(-1, 5, (4, size, size), generator=draw, dtype=torch.int32)
    depth = torch.rand(4, size, size, generator=draw) * 5
    depth[depth < 0.5] = 0
    normals = torch.nn.functional.normalize(torch.randn(4, 3, size, size, generator=draw), dim=1)
    normals[:, :, 2, 3:] = 0
    ids[1], depth[1], normals[1] = -1, 0, 0
    columns = {"s": ids, "d": depth, "n": normals}
    return base.Batch({"image": images[first:last]}, {}, {k: v[first:last] for k, v in columns.items()})


def enlarge(x: Tensor, size: int) -> Tensor:
    """(h, w) → (size, size), bilinear between the middles of cells."""
    at = ((torch.arange(size, dtype=x.dtype) + 0.5) * len(x) / size - 0.5).clamp(0, len(x) - 1)
    weights = (1 - (at[:, None] - torch.arange(len(x), dtype=x.dtype)).abs()).clamp(min=0)
    return weights @ x @ weights.T


def plain(kind: str, said: Tensor, batch: base.Batch) -> Tensor:
    """The loss of an expert, pixel by pixel; said (B, outputs, S, S)."""
    each = []
    for i in range(len(said)):
        values = []
        for at in ((a, b) for a in range(said.shape[2]) for b in range(said.shape[3])):
            z = said[i, :, at[0], at[1]]
            c, d, n = (
                batch.columns["s"][i][at],
                batch.columns["d"][i][at],
                batch.columns["n"][i][:, at[0], at[1]].double(),
            )
            if kind == "segment" and c >= 0:
                values.append(0.5 * -z.log_softmax(0)[int(c)])
            elif kind == "depth" and d > 0:
                values.append((z[0] - d.double().log()).abs())
            elif kind == "normals" and n.abs().sum() > 0:
                values.append(2 * (1 - z @ n / z.norm() / n.norm()))
            elif kind == "relative" and d > 0:
                values.append(torch.stack([z[0], d.double()]))
        if kind == "relative" and values:
            x, y = torch.stack(values, 1)
            x, y = x - x.sort().values[(len(x) - 1) // 2], y - y.sort().values[(len(y) - 1) // 2]
            values = [(x / x.abs().mean() - y / y.abs().mean()).abs().mean()]
        each += values
    return torch.stack(each).mean()


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("kind", ["segment", "depth", "relative", "normals"])
def test_value_and_gradients_equal_the_formula(kind, head):
    model, objective = made(**EXPERTS[kind], head=head, hidden=8)
    batch = batch_of()
    assert [m.size for m in objective.maps()] == [12]  # four a patch of 16 pixels, of 48
    only = next(iter(objective.heads.values()))

    def formula() -> Tensor:
        seen = only(towers.load_encoder(model).last(batch.views["image"]))
        said = torch.stack([torch.stack([enlarge(c, 12) for c in picture]) for picture in seen])
        return plain(kind, said, batch)

    found = []
    for loss in (lambda: sum(objective(batch, base.Features(model, batch)).values()), formula):
        model.zero_grad()
        objective.zero_grad()
        value = loss()
        value.backward()
        named = [*model.visual.named_parameters(), *objective.named_parameters()]
        found.append({"value": value.detach()} | {n: p.grad for n, p in named if p.grad is not None})
    # The projection takes no part; in our pass, which also makes the embedding, its gradient is there and nothing.
    assert found[1].keys() - {"proj"} == found[0].keys() - {"proj"} >= {"conv1.weight", "value"}
    for name, value in found[1].items():
        atol = 1e-7 if name == "positional_embedding" else 1e-11  # it is interpolated in float32
        torch.testing.assert_close(found[0][name], value, rtol=1e-7, atol=atol)


def test_logs_are_what_they_say():
    _, objective = made(**EXPERTS["all"])
    ids, depth = torch.tensor([[[0, 1], [2, -1]]]), torch.tensor([[[2.0, 4.0], [0.0, 1.0]]]).double()
    said = torch.zeros(1, 5, 2, 2).double()
    said[0, 1] = 1  # says 1 everywhere: right once of three
    objective._segment(said, ids)
    objective._depth(torch.full((1, 1, 2, 2), math.log(2.0)).double(), depth)
    up = torch.tensor([0.0, 1, 0]).double().view(1, 3, 1, 1).expand(1, 3, 2, 2)
    objective._normals(up, torch.tensor([0.0, 0, 1]).double().view(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert {k: float(v) for k, v in objective.logged.items()} == pytest.approx(
        {"accuracy": 1 / 3, "absrel": (0 + 0.5 + 1) / 3, "degrees": 90}
    )


@pytest.mark.parametrize("kind", EXPERTS)
def test_pictures_without_any_label_give_a_loss_of_zero_and_gradients(kind):
    model, objective = made(**EXPERTS[kind])
    batch = batch_of(1, 2)
    loss = sum(objective(batch, base.Features(model, batch)).values())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_relative_depth_does_not_see_scale_and_shift():
    model, objective = made(**EXPERTS["relative"])
    batch = batch_of()
    loss = objective(batch, base.Features(model, batch))["depth"]
    depth = batch.columns["d"]
    batch.columns["d"] = torch.where(depth > 0, 3 * depth.double() + 2, 0)
    torch.testing.assert_close(objective(batch, base.Features(model, batch))["depth"], loss)


TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
VIT = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 48}
FAST = TIMM | {"timm_model_name": "fastvit_t8"}  # whose last map is wider than its last stage


@pytest.mark.parametrize("vision", [None, TIMM, VIT, FAST], ids=["native", "resnet", "vit", "fastvit"])
def test_one_pass_gives_the_embedding_and_the_map(vision):
    custom = recipe()["towers"]["custom"]
    custom = custom | {"vision_cfg": vision, "custom_text": True} if vision else custom
    model, objective = made(custom, **EXPERTS["depth"])
    encoder = towers.load_encoder(model)
    model.eval()  # batch norms would move between the passes
    images = torch.randn(2, 3, encoder.size, encoder.size).double()
    features = base.Features(model, base.Batch({"image": images}, {}), encoder)
    torch.testing.assert_close(features.image(), model.encode_image(images, normalize=True))
    torch.testing.assert_close(features.dense(), encoder.last(images))
    side = objective.maps()[0].size
    columns = {"d": torch.ones(2, side, side)}
    assert objective(base.Batch({"image": images}, {}, columns), features)["depth"].isfinite()
    passes = []
    encoder.visual.register_forward_pre_hook(lambda *_: passes.append("pooled"))
    base.Features(model, base.Batch({"image": images}, {}), encoder).dense()
    assert not passes  # not a pass of the tower beside


def test_patch_dropout_keeps_the_map_whole():
    custom = recipe()["towers"]["custom"]
    vision = custom["vision_cfg"] | {"patch_dropout": 0.5}
    model, _ = made(custom | {"vision_cfg": vision}, **EXPERTS["depth"])
    model.train()
    images = batch_of().views["image"]
    features = base.Features(model, base.Batch({"image": images}, {}), towers.load_encoder(model))
    assert features.image().shape == (4, 16)
    torch.testing.assert_close(features.dense(), towers.load_encoder(model).last(images))


def test_pictures_that_are_no_whole_patches_are_labelled_where_they_are():
    """As with a tower of 56 px in patches of 16 (or 384 in 14): the map's last cells reach beyond the picture."""
    _, objective = made(**EXPERTS["depth"])
    objective.cells, objective.size = 56 / 16, 14
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4) * 16 + 8  # the middles of the cells, in pixels
    out = objective._enlarge(x)
    assert out.shape == (1, 1, 14, 14)
    middles = (torch.arange(14.0) + 0.5) * 4
    torch.testing.assert_close(out[0, 0, 0, 2:], middles[2:])


def step(kind: str, first: int, last: int) -> tuple[float, dict[str, Any]]:
    model, objective = made(**EXPERTS[kind])
    batch = batch_of(first, last)
    loss = sum(objective(batch, base.Features(model, batch)).values())
    loss.backward()
    named = [*model.visual.named_parameters(), *objective.named_parameters()]
    return loss.item(), {n: p.grad for n, p in named if p.grad is not None}


TWO = (
    LEAVE
    + """
import sys, torch, torch.distributed as dist
sys.path += sys.argv[2:]
from test_experts import EXPERTS, step
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for kind in EXPERTS:
    loss, grads = step(kind, 2 * rank, 2 * rank + 2)
    for g in grads.values():
        dist.all_reduce(g)
    found[kind] = loss, {k: g / 2 for k, g in grads.items()}
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
leave()
"""
)


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """The first process has a picture without any label, so the two count different numbers of pixels."""
    here = Path(__file__).parent
    on_two_processes(TWO, str(tmp_path), str(here), str(here.parent), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in EXPERTS:
        loss, grads = step(kind, 0, 4)
        assert sum(r[kind][0] for r in ranks) / 2 == pytest.approx(loss, rel=1e-10)
        assert ranks[0][kind][0] != pytest.approx(loss, rel=1e-3)
        for rank in ranks:
            assert rank[kind][1].keys() == grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(
                    rank[kind][1][name], grad, rtol=1e-8, atol=1e-7 if "positional" in name else 1e-11
                )


def test_it_trains_on_true_masks_of_scenes_and_resumes(tmp_path):
    """Scenes give their masks and depth as arrays; the heads learn, and the tower's gradient is not lost."""
    values = recipe(
        contrastive={}, experts={"segment": {"column": "semantic", "classes": 103}, "depth": {"column": "depth"}}
    )
    values["data"]["augment"] = {"scale": [0.4, 1.0], "flip": 0.5}
    values["train"] |= {"samples": 8 * 60, "warmup": 4, "save_every": 40}
    plan = Recipe.model_validate(values)
    rows = rows_of(loop.train(plan, tmp_path / "run", show=False))

    def mean(name: str, start: int, stop: int) -> float:
        return sum(r[name] for r in rows[start:stop]) / (stop - start)

    assert mean("experts/segment", 50, 60) < mean("experts/segment", 0, 5) - 1
    assert mean("experts/depth", 50, 60) < 0.9 * mean("experts/depth", 0, 5)
    assert mean("experts/accuracy", 50, 60) > 0.25
    real = loop.train_step

    def stop(run, batch):
        if run.step == 45:
            raise KeyboardInterrupt
        return real(run, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(loop, "train_step", stop)
        loop.train(plan, tmp_path / "again", show=False)
    again = rows_of(loop.train(plan, tmp_path / "again", resume=True, show=False))
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]


def test_errors_name_what_to_change(tmp_path):
    with pytest.raises(ValidationError, match="with a weight above 0"):
        Config.model_validate({"depth": {"column": "d", "weight": 0}})
    with pytest.raises(ValidationError, match="a column of its own"):
        Config.model_validate({"depth": {"column": "d"}, "segment": {"column": "d", "classes": 2}})
    with pytest.raises(ValidationError, match="name an expert and its column"):
        Config()
    values = recipe(experts={"segmnt": {"column": "s", "classes": 5}})
    with pytest.raises(ConfigError, match=r"unknown key 'objectives.experts.segmnt'.*did you mean 'segment'"):
        check(Recipe, values)
    plan = Recipe.model_validate(recipe(experts=SEGMENT))
    with pytest.raises(
        ConfigError, match=r"objectives.experts.segment needs a column.*no column 's'.*cutline label PAIRS"
    ):
        loop.train(plan, tmp_path / "run", show=False)
