"""nCLIP against its formula in float64, what its weights are reasoned from, and in training."""

import math

import pytest
import torch
from objectives_made import OWNERS, Linears, batch_of, recipe, rows_of, step
from torch import Tensor

from cutline.objectives.base import Features
from cutline.objectives.nclip import Config, Objective, entropies, standardise
from cutline.train import loop
from cutline.train.recipe import Recipe

SIZES = {"prototypes": 5, "hidden": 8, "bottleneck": 4}


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


def plain(p: Tensor, q: Tensor, owners: list[int], l1: float, l2: float) -> Tensor:
    """The docstring's formula with loops."""
    used, cross = sorted(set(owners)), 0.0
    each_q, mean_q = 0.0, torch.zeros(p.shape[1], dtype=p.dtype)
    for j, i in enumerate(owners):
        share = 1 / owners.count(i) / len(used)
        cross = cross - share * ((q[j] * p[i].log()).sum() + (p[i] * q[j].log()).sum()) / 2
        each_q, mean_q = each_q + share * entropy(q[j]), mean_q + share * q[j]
    each_p = sum(entropy(x) for x in p) / len(p)
    return cross + l1 * (each_p + each_q) / 2 - l2 * (entropy(p.mean(0)) + entropy(mean_q)) / 2


def assigned(head, x: Tensor, owners: list[int], temperature: float) -> Tensor:
    """Softmax of cosines that are standardised with each picture's texts sharing one weight."""
    share = torch.tensor([1 / owners.count(i) / len(set(owners)) for i in owners], dtype=x.dtype)[:, None]
    h = head.mlp(x)
    cosines = (h / h.norm(dim=1, keepdim=True)) @ (head.last.weight / head.last.weight.norm(dim=1, keepdim=True)).T
    mean = (share * cosines).sum(0)
    deviation = ((share * (cosines - mean) ** 2).sum(0) + 1e-8).sqrt()
    return ((cosines - mean) / deviation / temperature).softmax(1)


@pytest.mark.parametrize("kind", OWNERS)
def test_value_and_gradients_equal_the_formula(kind):
    config = {**SIZES, "confident": 0.3, "spread": 1.7, "temperature": 0.4}
    batch = batch_of(kind)
    value, ours = step("nclip", config, batch)
    torch.manual_seed(0)
    model = Linears()
    objective = Objective(Config(**config), model).double()
    p = assigned(objective.image, model.encode_image(batch.views["image"], True), [0, 1, 2, 3], 0.4)
    q = assigned(objective.text, model.encode_text(batch.texts["text"].tokens, True), OWNERS[kind], 0.4)
    loss = plain(p, q, OWNERS[kind], 0.3, 1.7)
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-10)
    theirs = {**dict(model.named_parameters(prefix="model")), **dict(objective.named_parameters(prefix="objective"))}
    assert len(ours) == 2 * 7 + 2  # two heads of three layers and prototypes, two towers
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-11)


def test_a_sum_over_columns_weighs_each_column():
    torch.manual_seed(0)
    batch, model = batch_of("paired"), Linears()
    words = batch.texts["text"]
    batch.texts = {"alt": words, "captions": type(words)(words.tokens.flip(0), words.owners, True, 0.5)}
    objective = Objective(Config(**SIZES), model).double()
    terms = objective(batch, Features(model, batch))
    for source, weight in (("alt", 1.0), ("captions", 0.5)):
        batch.texts = {
            source: type(words)(
                batch.texts[source].tokens if source in batch.texts else words.tokens.flip(0), words.owners, True
            )
        }
        alone = objective(batch, Features(model, batch))
        for term in ("cross", "confident", "spread"):
            assert terms[f"{term}/{source}"].item() == pytest.approx(weight * alone[f"{term}/{source}"].item())


def test_one_sample_is_finite():
    loss, parameters = step("nclip", SIZES, batch_of("paired", 0, 1))
    assert loss.item() == pytest.approx((1 + 0.5 - 2.0) * math.log(5))  # alone, a sample says nothing: uniform
    assert all(torch.isfinite(p.grad).all() for p in parameters.values())


def test_assignments_that_are_rounded_to_zero_have_a_finite_gradient():
    logits = torch.tensor([[0.0, -200.0, -200.0], [0.0, -200.0, -300.0]], requires_grad=True)
    each, of_mean = entropies(logits.log_softmax(1), torch.full((2,), 0.5))
    (each + of_mean).backward()
    assert torch.isfinite(logits.grad).all()


def test_standardised_columns_have_mean_0_and_variance_1_under_their_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4, dtype=torch.float64) * 7 + 3, torch.rand(9, dtype=torch.float64)
    weight /= weight.sum()
    y = standardise(x, weight)
    assert (weight @ y).abs().max().item() < 1e-12
    torch.testing.assert_close(weight @ y**2, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_near_the_uniform_distribution_the_loss_bends_as_the_docstring_says(l1):
    """The three directions of the docstring, of 4 pairs and 6 prototypes: change of L over K/2 |δ|²."""
    n, k, l2 = 4, 6, 2.0
    torch.manual_seed(0)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    own = centred(torch.randn(n, k, dtype=torch.float64))
    own -= own.mean(0)  # in no sum over samples
    shared = centred(torch.randn(1, k, dtype=torch.float64)).expand(n, k)
    zero = torch.zeros(n, k, dtype=torch.float64)
    for image, text, bend in ((own, own, -(1 + l1)), (own, zero, (1 - l1) / 2), (shared, shared, l2 - 1 - l1)):
        a, b = (1 / k + 1e-4 * x / x.square().sum(1).mean().sqrt().clamp(min=1e-9) for x in (image, text))
        change = plain(a, b, [0, 1, 2, 3], l1, l2) - (1 + l1 - l2) * math.log(k)
        assert change.item() / (k / 2 * 1e-8) == pytest.approx(bend, abs=1e-3)


def test_it_trains_and_logs_what_shows_a_collapse(tmp_path):
    v = recipe(nclip={"prototypes": 32, "hidden": 32, "bottleneck": 16})
    v["train"]["samples"] = 640
    rows = rows_of(loop.train(Recipe.model_validate(v), tmp_path / "run"))
    assert sum(r["loss"] for r in rows[-8:]) < sum(r["loss"] for r in rows[:8]) - 8 * 0.2
    for r in rows:
        for source in ("image", "text"):
            assert 0 <= r[f"nclip/entropy/each/{source}"] <= r[f"nclip/entropy/mean/{source}"] <= math.log(32) + 1e-5
    assert r["nclip/entropy/mean/image"] - r["nclip/entropy/each/image"] > 0.1


def test_a_collapsed_run_is_told():
    model = Linears()
    objective = Objective(Config(**SIZES), model).double()
    batch = batch_of("paired")
    batch.views["image"] = batch.views["image"][:1].expand(4, 6)  # all pictures alike
    objective(batch, Features(model, batch))
    objective.after_step(model, 0)
    assert "nclip has collapsed" in objective.collapse
    objective(batch_of("paired"), Features(model, batch_of("paired")))
    objective.after_step(model, 1)
    assert objective.collapse == ""
