"""Masked autoencoder: the formula, what the encoder sees of a picture, processes, resume, collapse, recipes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from objectives_made import TIMM, painted, recipe, rows_of, same_values_and_gradients, stopped_and_resumed, timm
from processes import LEAVE, on_two_processes
from torch import Tensor, nn

from cutline import config, towers
from cutline.errors import ConfigError
from cutline.objectives import base, mae
from cutline.objectives.mae import Config, Objective, normalised, patchify
from cutline.train import loop
from cutline.train.recipe import Recipe

SMALL = {"width": 16, "depth": 2, "heads": 2}
RECIPES = Path(__file__).parents[2] / "recipes"


def made(vision: dict | None = None, **options: object) -> tuple[towers.Model, Objective]:
    torch.manual_seed(0)
    custom = recipe()["towers"]["custom"]
    custom = custom | {"vision_cfg": custom["vision_cfg"] | (vision or {})}
    model = towers.build(towers.TowerConfig(custom=custom)).double()
    objective = Objective(Config.model_validate(SMALL | options), model).double()
    with torch.no_grad():  # norms and biases that say something
        for p in [*model.visual.parameters(), *objective.parameters()]:
            p.add_(torch.randn_like(p) / 20)
    return model, objective


def pictures(count: int = 4, size: int = 48) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


# The plain form: one picture and one patch at a time, blocks written out.


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + layer.eps).sqrt() * layer.weight + layer.bias  # fmt: skip


def attention(x: Tensor, inward: tuple[Tensor, Tensor], outward: tuple[Tensor, Tensor], heads: int) -> Tensor:
    q, k, v = linear(x, *inward).chunk(3, dim=1)  # (T, C) each
    size, out = x.shape[1] // heads, []
    for h in range(heads):
        mine = slice(h * size, (h + 1) * size)
        weights = (q[:, mine] @ k[:, mine].T / size**0.5).exp()
        out.append(weights / weights.sum(1, keepdim=True) @ v[:, mine])
    return linear(torch.cat(out, dim=1), *outward)


def pair(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def encode(visual: nn.Module, picture: Tensor, visible: list[int], patch: int, grid: int) -> Tensor:
    """Only the visible patches of a picture, and the class token, through the tower: (1 + V, C)."""
    tokens = [visual.class_embedding + visual.positional_embedding[0]]
    for at in visible:
        top, left = at // grid * patch, at % grid * patch
        pixels = picture[:, top : top + patch, left : left + patch].flatten()
        tokens.append(visual.conv1.weight.flatten(1) @ pixels + visual.positional_embedding[1 + at])
    x = norm(torch.stack(tokens), visual.ln_pre)
    for block in visual.transformer.resblocks:
        inward = (block.attn.in_proj_weight, block.attn.in_proj_bias)
        x = x + attention(norm(x, block.ln_1), inward, pair(block.attn.out_proj), block.attn.num_heads)
        x = x + linear(F.gelu(linear(norm(x, block.ln_2), *pair(block.mlp.c_fc))), *pair(block.mlp.c_proj))
    return norm(x, visual.ln_post)


def decode(decoder: mae.Decoder, seen: Tensor, visible: list[int], heads: int) -> Tensor:
    """What it says of all patches: (N, n)."""
    entered = linear(seen, *pair(decoder.enter))
    x = [decoder.token] * len(decoder.positions)
    for token, at in zip(entered[1:], visible, strict=True):
        x[at] = token
    x = torch.stack([entered[0], *(t + p for t, p in zip(x, decoder.positions, strict=True))])
    for block in decoder.blocks:
        x = x + attention(norm(x, block.norm1), pair(block.attn.qkv), pair(block.attn.proj), heads)
        x = x + linear(F.gelu(linear(norm(x, block.norm2), *pair(block.mlp.fc1))), *pair(block.mlp.fc2))
    return linear(norm(x[1:], decoder.norm), *pair(decoder.pixels))


def plain_loss(model: nn.Module, objective: Objective, images: Tensor, order: Tensor, grid: int = 3) -> Tensor:
    each = []
    for picture, places in zip(images, order.tolist(), strict=True):
        masked, visible = places[: objective.masked], places[objective.masked :]
        seen = encode(model.visual, picture, visible, 16, grid)
        said = decode(objective.decoder, seen, visible, objective.config.heads)
        for at in masked:
            top, left = at // grid * 16, at % grid * 16
            pixels = picture[:, top : top + 16, left : left + 16].permute(1, 2, 0).flatten()
            variance = (pixels - pixels.mean()).square().sum() / (len(pixels) - 1)
            each.append((said[at] - (pixels - pixels.mean()) / (variance + 1e-6).sqrt()).square().mean())
    return torch.stack(each).mean()


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_value_and_gradients_equal_the_plain_form(pool):
    model, objective = made({"pool_type": pool, "layers": 2})
    images = pictures()
    torch.manual_seed(5)
    order = objective.order(4, images.device)

    def ours() -> Tensor:
        torch.manual_seed(5)
        batch = base.Batch({"image": images}, {})
        return objective(batch, base.Features(model, batch))["pixels"]

    losses = (ours, lambda: plain_loss(model, objective, images, order))
    names = same_values_and_gradients(model, objective, losses, rtol=1e-8, atol=1e-11)
    assert names >= {"conv1.weight", "class_embedding", *(n for n, _ in objective.named_parameters())}


def test_positions_of_the_decoder_are_fixed_sines_and_cosines():
    decoder = made()[1].decoder
    rates = torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    for at, position in enumerate(decoder.positions):
        y, x = at // 3 * rates, at % 3 * rates
        torch.testing.assert_close(position, torch.cat([y.sin(), x.sin(), y.cos(), x.cos()]), rtol=0, atol=1e-6)
    assert "positions" not in dict(decoder.named_parameters())


def test_with_all_visible_it_is_the_encoder():
    model, _ = made()
    images = pictures()
    seen = towers.load_encoder(model).shown(images, torch.arange(9).expand(4, 9))
    torch.testing.assert_close(seen[:, 1:], towers.load_encoder(model).last(images).flatten(2).transpose(1, 2))


def test_the_encoder_sees_nothing_of_a_masked_patch_and_is_as_long_as_what_it_sees():
    model, _ = made()
    encoder = towers.load_encoder(model)
    images, visible = pictures(2), torch.tensor([[0, 5], [1, 2]])
    lengths: list[int] = []
    model.visual.transformer.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    before = encoder.shown(images, visible)
    other = images.clone()
    other[0, :, 32:] = 9.0  # patches 6, 7, 8
    other[1, :, 0, 20] += 1  # of patch 1
    changed = (encoder.shown(other, visible) - before).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [False, True]
    assert lengths == [3, 3]


@pytest.mark.parametrize("kind", TIMM)
def test_timms_transformers_see_what_is_visible_alone_and_train(kind, tmp_path):
    values = recipe(mae=SMALL)
    values["towers"]["custom"] = timm(kind)
    values["train"] |= {"samples": 32}
    run = loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=False)
    images = next(iter(run.stream.batches(until=1))).views["image"]
    encoder = towers.load_encoder(run.trainee.model.eval())
    order = run.trainee.objectives["mae"].order(len(images), images.device)
    whole = encoder.last(images).flatten(2).transpose(1, 2)
    shown = encoder.shown(images, order)[:, -order.shape[1] :]  # positions go with their patches
    torch.testing.assert_close(shown, torch.take_along_dim(whole, order[..., None], dim=1))
    masked, visible = order[:, :3], order[:, 3:]
    before, after = (encoder.shown(x, visible) for x in (images, painted(images, masked, encoder.multiple)))
    torch.testing.assert_close(after, before)
    assert (encoder.shown(painted(images, order[:, 3:4], encoder.multiple), visible) - before).abs().max() > 0.01
    rows = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "trained", show=False))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["skipped_steps"] == 0


def test_targets_are_patches_with_mean_0_and_unbiased_variance_1():
    images = pictures(2)
    images[0, :, :16, :16] = 0.7
    model, _ = made()
    patches = patchify(images, (3, 3), 16)
    weight = model.visual.conv1.weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(patches @ weight.T, model.visual.conv1(images).flatten(2).transpose(1, 2))
    assert torch.equal(patchify(F.pad(images, (0, 9, 0, 9)), (3, 3), 16), patches)  # what no patch covers is left out
    told = normalised(patches)
    assert told[0, 0].abs().max() < 1e-9  # an even one
    torch.testing.assert_close(told[1].mean(-1), torch.zeros(9).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(told[1].var(-1), torch.ones(9).double(), rtol=1e-5, atol=0)
    assert told[1].square().mean().item() == pytest.approx(1 - 1 / 768, rel=1e-5)  # the loss of who says 0


@pytest.mark.parametrize(("ratio", "masked"), [(0.75, 7), (0.5, 4), (0.01, 1), (0.99, 8)])
def test_masks_hide_as_many_of_each_picture_and_are_drawn_from_the_generator(ratio, masked):
    _, objective = made(ratio=ratio)
    assert objective.masked == masked
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(objective.order(5, torch.device("cpu")))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(sorted(row) == list(range(9)) for row in draws[0].tolist())
    many = objective.order(4000, torch.device("cpu"))[:, :masked]
    assert (torch.bincount(many.flatten(), minlength=9) / 4000).tolist() == pytest.approx([masked / 9] * 9, abs=0.04)


def test_towers_that_cannot_leave_patches_out_are_refused():
    custom = recipe()["towers"]["custom"]
    timm = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    model = towers.build(towers.TowerConfig(custom=custom | {"vision_cfg": timm, "custom_text": True}))
    with pytest.raises(ConfigError, match="objectives.mae.*vit-tiny-64.*objectives.silc"):
        Objective(Config(), model)
    relative = timm | {"timm_model_name": "test_vit_relpos", "image_size": 160}  # biases for the pairs of all patches
    model = towers.build(towers.TowerConfig(custom=custom | {"vision_cfg": relative, "custom_text": True}))
    with pytest.raises(ConfigError, match="objectives.mae shows the tower some of the patches"):
        Objective(Config(), model)
    with pytest.raises(ConfigError, match="coca-tiny-64 is another"):  # its convolutions see beyond a patch
        Objective(Config(), towers.build(towers.TowerConfig(model="coca-tiny-64")))
    one = custom | {"vision_cfg": custom["vision_cfg"] | {"patch_size": 48}}
    with pytest.raises(ConfigError, match="one patch of a picture"):
        Objective(Config(), towers.build(towers.TowerConfig(custom=one)))
    with pytest.raises(ConfigError, match="width 16 does not divide over 3 heads"):
        config.check(Recipe, recipe(mae=SMALL | {"heads": 3}))


@pytest.mark.parametrize("count", [1, 2])
def test_few_pictures_and_patch_dropout_of_the_tower(count):
    """One picture has no others to be told from. The tower's own patch dropout would drop what is visible: it does not."""
    model, objective = made({"patch_dropout": 0.5})
    batch = base.Batch({"image": pictures(count)}, {})
    loss = objective.train()(batch, base.Features(model.train(), batch))["pixels"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert ("explained" in objective.logged) == (count > 1)
    assert ("feature_std" in objective.logged) == (count > 1)
    if count == 1:
        objective.after_step(model, 0)
        assert objective.collapse == ""


def test_under_autocast_targets_and_loss_are_float32():
    model, objective = (m.float() for m in made())
    batch = base.Batch({"image": pictures().float()}, {})
    losses = []
    for half in (False, True):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(objective(batch, base.Features(model, batch))["pixels"])
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_explained_is_the_share_of_what_places_leave_and_0_is_said():
    model, objective = made()
    images = pictures(6)
    batch = base.Batch({"image": images}, {})
    told = normalised(patchify(images, (3, 3), 16))
    loss = objective(batch, base.Features(model, batch))["pixels"]
    mean = told.mean(0)
    left = (told - mean).square().mean() * 6 / 5
    assert objective.logged["explained"].item() == pytest.approx(1 - (loss / left).item())
    with torch.no_grad():  # the decoder says the same of every picture
        objective.decoder.pixels.weight.zero_()
        objective.decoder.pixels.bias.fill_(0.2)
    objective(batch, base.Features(model, batch))
    objective.after_step(model, 0)
    assert objective.logged["explained"] < 0.01
    assert "no better than those of any picture at the same places" in objective.collapse
    objective.logged["explained"] = torch.tensor(0.3)
    objective.after_step(model, 1)
    assert objective.collapse == ""


STEP = """
import torch
from cutline import towers
from cutline.objectives import mae
from cutline.train.loop import Trainee
from cutline.train.recipe import Recipe

def one_step(values, batch, first):
    # the masks of a picture depend on its place in the joined batch
    def drawn(self, pictures, device):
        draws = [torch.Generator().manual_seed(first + i) for i in range(pictures)]
        return torch.stack([torch.randperm(9, generator=g) for g in draws])
    before, mae.Objective.order = mae.Objective.order, drawn
    torch.manual_seed(0)
    recipe = Recipe.model_validate(values)
    trainee = Trainee(towers.build(recipe.towers), recipe).double()
    loss, log = trainee(batch)
    loss.backward()
    mae.Objective.order = before
    return loss.detach(), {n: p.grad for n, p in trainee.named_parameters() if p.grad is not None}
"""

TWO = (
    LEAVE
    + STEP
    + """
import sys, torch.distributed as dist
from cutline.objectives.base import Batch
dist.init_process_group("gloo")
rank = dist.get_rank()
data = torch.load(sys.argv[1], weights_only=True)
loss, grads = one_step(data["recipe"], Batch({"image": data["images"].chunk(2)[rank]}, {}), 3 * rank)
for g in grads.values():
    dist.all_reduce(g)
torch.save({"loss": loss, "grads": {n: g / 2 for n, g in grads.items()}}, sys.argv[2] + str(rank))
leave()
"""
)


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """Value, and gradient of every parameter."""
    images, values = pictures(6), recipe(mae=SMALL)
    torch.save({"images": images, "recipe": values}, tmp_path / "data.pt")
    on_two_processes(TWO, str(tmp_path / "data.pt"), str(tmp_path / "out"), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"out{r}", weights_only=True) for r in range(2)]
    space: dict = {}
    exec(STEP, space)
    loss, grads = space["one_step"](values, base.Batch({"image": images}, {}), 0)
    assert sum(r["loss"].item() for r in ranks) / 2 == pytest.approx(loss.item(), rel=1e-12)
    assert "objectives.mae.decoder.token" in grads
    for r in ranks:
        assert r["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(r["grads"][name], grad, rtol=1e-9, atol=1e-12)


def test_it_trains_without_texts_and_resumes_exactly_with_its_masks(tmp_path):
    values = recipe(mae=SMALL | {"width": 32})
    values["train"] |= {"batch": 16, "samples": 60 * 16, "warmup": 8, "save_every": 40}
    whole = loop.train(Recipe.model_validate(values), tmp_path / "whole", show=False)
    rows = rows_of(whole)
    assert sum(r["mae/pixels"] for r in rows[-8:]) < sum(r["mae/pixels"] for r in rows[:8]) - 8 * 0.1
    assert sum(r["mae/explained"] for r in rows[-8:]) / 8 > 0.02
    assert rows[-1]["mae/feature_std"] > 0.1
    again = stopped_and_resumed(values, tmp_path / "again", 43)
    assert [r["loss"] for r in rows_of(again)] == [r["loss"] for r in rows]
