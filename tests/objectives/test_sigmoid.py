"""The sigmoid loss against reference values, open_clip, a plain float64 version, two real processes, and in training."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from objectives_made import recipe, rows_of
from open_clip.loss import SigLipLoss
from torch import Tensor

from cutline import towers
from cutline.objectives.sigmoid import sigmoid_loss, start
from cutline.train import loop
from cutline.train.recipe import Recipe


def number(x: float, grad: bool = False) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


def ours(image: Tensor, text: Tensor, owners: Tensor, chunk: int | None = None, paired: bool = True) -> Tensor:
    return sigmoid_loss(image, text, owners, number(10.0), number(-10.0), paired, chunk)[0]


@pytest.mark.parametrize("chunk", [None, 1, 3, 4])
def test_loss_equals_the_reference_value(vectors, chunk):
    loss = ours(vectors["image"], vectors["text"], torch.arange(4), chunk)
    assert loss.item() == pytest.approx(7.3450499370, abs=1e-9)


def plain(image: Tensor, text: Tensor, owners: list[int], t: Tensor, b: Tensor) -> Tensor:
    """The docstring's formula with loops."""
    total = number(0.0)
    for j, owner in enumerate(owners):
        for i in range(len(image)):
            z = 1 if i == owner else -1
            x = t * (image[i] @ text[j]) + b
            total = total - torch.log(1 / (1 + torch.exp(-z * x))) / owners.count(owner)
    return total / len(set(owners))


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [0, 0, 1, 2, 2, 2, 3], [1, 1, 3]])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_value_and_gradients_equal_the_formula(vectors, owners, chunk):
    torch.manual_seed(0)
    text = F.normalize(torch.randn(len(owners), 6, dtype=torch.float64), dim=1)
    found = []
    for loss in (
        lambda *x: sigmoid_loss(x[0], x[1], torch.tensor(owners), x[2], x[3], owners == [0, 1, 2, 3], chunk)[0],
        lambda *x: plain(x[0], x[1], owners, x[2], x[3]),
    ):
        features = [x.clone().requires_grad_() for x in (vectors["image"], text)]
        leaves = [*features, number(9.0, True), number(-8.0, True)]
        value = loss(*leaves)
        (0.3 * value).backward()
        found.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_value_and_gradient_equal_open_clips_loss(vectors):
    grads = []
    for loss in (
        lambda im: ours(im, vectors["text"], torch.arange(4), 2),
        lambda im: SigLipLoss()(im, vectors["text"], number(10.0), number(-10.0)),
    ):
        image = vectors["image"].clone().requires_grad_()
        loss(image).backward()
        grads.append(image.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_the_share_that_finds_its_text_is_that_of_the_whole_matrix():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(n, 4), dim=1) for n in (16, 24))
    owners = torch.arange(24) % 16
    best = owners[(image @ text.T).argmax(1)] == torch.arange(16)
    for chunk in (None, 5):
        _, hits = sigmoid_loss(image, text, owners, torch.tensor(10.0), torch.tensor(-10.0), False, chunk)
        assert hits.item() == pytest.approx(best.float().mean().item())


def test_one_picture_has_no_negatives_and_a_finite_gradient(vectors):
    image = vectors["image"][:1].clone().requires_grad_()
    loss = ours(image, vectors["text"], torch.zeros(4, dtype=torch.long), paired=False)
    loss.backward()
    expected = -sum(F.logsigmoid(10 * image[0] @ t - 10) for t in vectors["text"]) / 4
    assert loss.item() == pytest.approx(expected.item())
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("rule", ["sample", "sum", "all"])
def test_it_trains_and_the_saved_model_has_its_bias(tmp_path, rule):
    values = recipe(sigmoid={"chunk": 4}, text={"columns": {"alt": 1, "captions": 0.5}, "rule": rule})
    run = loop.train(Recipe.model_validate(values), tmp_path / "run")
    rows = rows_of(run)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["logit_scale"] == pytest.approx(10, abs=0.1)
    assert {k for k in rows[0] if k.startswith("sigmoid/")} == {"sigmoid/bias"} | {
        f"sigmoid/{a}{s}" for s in (["alt", "captions"] if rule == "sum" else ["text"]) for a in ("", "accuracy/")
    }
    theirs = open_clip.create_model(f"local-dir:{run / 'model'}")
    assert theirs.logit_bias.item() == pytest.approx(rows[-1]["sigmoid/bias"], abs=0.01)
    assert theirs.logit_bias.item() != -10
    again = towers.build(towers.TowerConfig(model=str(run)))
    before = again.logit_bias.item(), again.logit_scale.item()
    start(again, 10.0, -10.0)
    assert (again.logit_bias.item(), again.logit_scale.item()) == before


def test_an_untrained_siglip_tower_starts_at_scale_and_bias_of_the_recipe():
    """open_clip's SigLIP configs name a bias and no scale, so that theirs starts at 1 / 0.07."""
    custom = recipe()["towers"]["custom"] | {"init_logit_bias": -10.0}
    model = towers.build(towers.TowerConfig(custom=custom))
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    start(model, 12.0, -9.0)
    assert model.logit_scale.exp().item() == pytest.approx(12)
    assert model.logit_bias.item() == -9
    assert model.model_cfg["init_logit_scale"] == math.log(12)
