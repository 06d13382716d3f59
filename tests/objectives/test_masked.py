"""Masked patches: the formula, what the student sees of a picture, the draw of the masks, and training on scenes."""

import pytest
import torch
import torch.nn.functional as F
from objectives_made import TIMM, painted, recipe, rows_of, timm
from torch import Tensor

from cutline import towers
from cutline.errors import ConfigError
from cutline.objectives import base
from cutline.objectives.masked import Config, Objective, random_patches
from cutline.train import loop
from cutline.train.recipe import Recipe

SMALL = {"prototypes": 64, "hidden": 64, "bottleneck": 32}


def made(**options: object) -> tuple[towers.Model, Objective]:
    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig.model_validate(recipe()["towers"])).double()
    return model, Objective(Config.model_validate(SMALL | options), model).double()


def pictures() -> Tensor:
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)).double()


def student_sees(model: towers.Model, images: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
    """open_clip's own forward pass, patches replaced one at a time behind its first convolution."""

    def replace(_: object, __: object, out: Tensor) -> Tensor:
        out = out.clone()
        for picture, places in enumerate(hidden.tolist()):
            for at in places:
                out[picture, :, at // 3, at % 3] = token
        return out

    handle = model.visual.conv1.register_forward_hook(replace)
    try:
        tokens = model.visual.forward_intermediates(images, normalize_intermediates=True, output_fmt="NLC")
    finally:
        handle.remove()
    return tokens["image_intermediates"][-1]


@pytest.mark.parametrize("all_patches", [False, True])
def test_value_and_gradients_equal_the_formula(all_patches):
    model, objective = made(all_patches=all_patches)
    images, head = pictures(), objective.prototypes.student
    torch.manual_seed(5)
    hidden = random_patches(4, 9, 7, images.device)

    def logits(x: Tensor) -> Tensor:
        return F.normalize(head.mlp(x), dim=-1) @ F.normalize(head.last.weight, dim=-1).T

    def ours() -> Tensor:
        torch.manual_seed(5)
        whole = base.Batch({"image": images}, {})
        return objective(whole, base.Features(model, whole))["patches"]

    def plain() -> Tensor:
        whole = towers.load_encoder(model).last(images).flatten(2).transpose(1, 2).detach()
        said = student_sees(model, images, hidden, objective.token)
        places = [range(9)] * 4 if all_patches else hidden.tolist()
        each = [
            -((logits(whole[i, at]) / 0.04).softmax(0).detach() * (logits(said[i, at]) / 0.1).log_softmax(0)).sum()
            for i, patches in enumerate(places)
            for at in patches
        ]
        assert len(each) == (36 if all_patches else 28)
        return torch.stack(each).mean()

    found = []
    for loss in (ours, plain):
        model.zero_grad()
        objective.zero_grad()
        value = loss()
        value.backward()
        names = {"token": objective.token} | dict(model.visual.named_parameters()) | dict(head.named_parameters())
        found.append({"value": value.detach()} | {n: p.grad for n, p in names.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"token", "conv1.weight", "positional_embedding"}
    for name, value in found[0].items():
        torch.testing.assert_close(
            value, found[1][name], rtol=1e-7, atol=1e-7 if name == "positional_embedding" else 1e-12
        )


@pytest.mark.parametrize("kind", TIMM)
def test_timms_transformers_see_the_token_in_place_of_the_hidden_and_train(kind, tmp_path):
    values = recipe(masked=SMALL, silc={**SMALL, "local_views": 1})
    values["towers"]["custom"] = timm(kind)
    values["train"] |= {"samples": 32, "micro_batch": 5}
    run = loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=False)
    batch = next(iter(run.stream.batches(until=1)))
    objective = run.trainee.objectives["masked"].eval()
    encoder, images, patches = objective.student, batch.views["image"], objective.patches
    assert patches == (16 if kind.startswith("eva02") else 9)
    nothing = torch.zeros(len(images), 0, dtype=torch.long)
    whole = encoder.last(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(objective.fill(images, nothing), whole)
    pooled, target = objective.tower(images)
    torch.testing.assert_close(target, whole)
    torch.testing.assert_close(pooled, encoder.pooled(images))
    hidden = random_patches(len(images), patches, 1, images.device)
    other = painted(images, hidden, encoder.multiple)
    torch.testing.assert_close(objective.fill(other, hidden), objective.fill(images, hidden))
    assert (objective.fill(other, nothing) - whole).abs().max() > 0.01
    rows = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "trained", show=False))
    assert all(torch.isfinite(torch.tensor(r["masked/patches"])) for r in rows)
    assert rows[-1]["skipped_steps"] == 0


def test_with_nothing_hidden_the_student_sees_what_the_encoder_sees():
    model, objective = made()
    seen = objective.fill(pictures(), torch.zeros(4, 0, dtype=torch.long))
    torch.testing.assert_close(seen, towers.load_encoder(model).last(pictures()).flatten(2).transpose(1, 2))


def test_the_student_sees_nothing_of_a_hidden_patch():
    _, objective = made()
    images, hidden = pictures(), torch.tensor([[0, 5], [1, 2], [3, 8], [4, 7]])
    other = images.clone()
    for picture, places in enumerate(hidden.tolist()):
        for at in places:
            top, left = at // 3 * 16, at % 3 * 16
            other[picture, :, top : top + 16, left : left + 16] = 9.0
    torch.testing.assert_close(objective.fill(other, hidden), objective.fill(images, hidden))
    other[:, :, 0, 20] += 1  # of patch 1, which is hidden in the second picture alone
    changed = (objective.fill(other, hidden) - objective.fill(images, hidden)).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [True, False, True, True]


def test_masks_are_a_pure_function_of_the_generator_and_hide_as_many_of_each_picture():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(random_patches(5, 16, 12, torch.device("cpu")))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(len(set(row)) == 12 and set(row) <= set(range(16)) for row in draws[0].tolist())
    torch.manual_seed(0)
    many = random_patches(4000, 8, 6, torch.device("cpu"))
    shares = torch.bincount(many.flatten(), minlength=8) / 4000
    assert shares.tolist() == pytest.approx([0.75] * 8, abs=0.03)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 7), (0.5, 4), (0.01, 1), (0.99, 8)])
def test_a_share_is_rounded_to_patches_of_which_one_is_seen(ratio, hidden):
    assert made(ratio=ratio)[1].masked == hidden


def test_towers_that_take_no_token_are_refused():
    custom = recipe()["towers"]["custom"]
    timm = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    model = towers.build(towers.TowerConfig(custom=custom | {"vision_cfg": timm, "custom_text": True}))
    with pytest.raises(ConfigError, match="token in place of patches.*vit-tiny-64.*objectives.silc"):
        Objective(Config.model_validate(SMALL), model)
    one = custom | {"vision_cfg": custom["vision_cfg"] | {"patch_size": 48}}
    with pytest.raises(ConfigError, match="one patch of a picture"):
        Objective(Config.model_validate(SMALL), towers.build(towers.TowerConfig(custom=one)))


@pytest.mark.parametrize("all_patches", [False, True])
def test_it_trains_alone_without_texts(tmp_path, all_patches):
    """In the end the student tells patches apart that it does not see: its loss is below saying the same of all."""
    values = recipe(masked={**SMALL, "all_patches": all_patches})
    values["train"] |= {"batch": 16, "samples": 64 * 16, "warmup": 8, "lr": 2e-3}
    rows = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "run", show=False))

    def mean(name: str, start: int, stop: int) -> float:
        return sum(r[f"masked/{name}"] for r in rows[start:stop]) / (stop - start)

    assert mean("patches", 56, 64) < mean("patches", 0, 8) - 0.3
    assert mean("patches", 56, 64) < mean("entropy/mean", 56, 64)
    assert mean("entropy/mean", 56, 64) > mean("entropy/each", 56, 64) + 0.5
