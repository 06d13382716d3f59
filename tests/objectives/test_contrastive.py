"""InfoNCE against reference values, open_clip, a plain float64 version, and two real processes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from processes import LEAVE, on_two_processes
from torch import Tensor

from cutline.errors import ConfigError
from cutline.objectives.base import Batch, Features, Texts
from cutline.objectives.contrastive import Config, Objective, multi_positive_loss, paired_loss
from cutline.pairs import Pairs
from cutline.scenes import SceneConfig
from cutline.scenes.write import write_pairs
from cutline.train import loop
from cutline.train.recipe import Recipe


@pytest.mark.parametrize(
    ("scale", "loss"), [(1, 1.3241546506), (10, 4.4084692029), (1 / 0.07, 6.1650187601), (100, 42.1038606508)]
)
def test_loss_equals_reference_values(vectors, scale, loss):
    got, _ = paired_loss(vectors["image"], vectors["text"], torch.tensor(scale, dtype=torch.float64))
    assert got.item() == pytest.approx(loss, abs=1e-9)


def test_gradients_equal_reference_values(vectors):
    image, text = vectors["image"].requires_grad_(), vectors["text"]
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    paired_loss(image, text, scale)[0].backward()
    assert image.grad.norm().item() == pytest.approx(8.4301595382, abs=1e-9)
    assert scale.grad.item() == pytest.approx(0.4044089250, abs=1e-9)


def plain_multi_positive(image: Tensor, text: Tensor, owners: list[int], scale: float) -> Tensor:
    """The docstring's formula with loops."""
    s = scale * image @ text.T
    used = sorted(set(owners))
    total = torch.zeros((), dtype=s.dtype)
    for i in used:
        mine = [j for j, o in enumerate(owners) if o == i]
        others = [j for j, o in enumerate(owners) if o != i]
        for j in mine:
            total = total + (torch.logsumexp(s[i, [j, *others]], 0) - s[i, j]) / len(mine) / len(used)
            total = total + (torch.logsumexp(s[:, j], 0) - s[i, j]) / len(mine) / len(used)
    return total / 2


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [0, 0, 1, 2, 2, 2, 3], [1, 1, 3]])
def test_multi_positive_equals_its_formula_in_value_and_gradient(vectors, owners):
    torch.manual_seed(0)
    text = F.normalize(torch.randn(len(owners), 6, dtype=torch.float64), dim=1)
    grads = []
    for loss in (
        lambda im, tx: multi_positive_loss(im, tx, torch.tensor(owners), torch.tensor(10.0))[0],
        lambda im, tx: plain_multi_positive(im, tx, owners, 10.0),
    ):
        im, tx = vectors["image"].clone().requires_grad_(), text.clone().requires_grad_()
        value = loss(im, tx)
        value.backward()
        grads.append((value.detach(), im.grad, tx.grad))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_multi_positive_with_one_text_each_is_the_paired_loss(vectors):
    scale = torch.tensor(10.0, dtype=torch.float64)
    many, _ = multi_positive_loss(vectors["image"], vectors["text"], torch.arange(4), scale)
    assert many.item() == pytest.approx(paired_loss(vectors["image"], vectors["text"], scale)[0].item(), abs=1e-12)


def test_collapsed_embeddings_give_log_of_the_batch():
    same = F.normalize(torch.ones(8, 4), dim=1)
    assert paired_loss(same, same, torch.tensor(100.0))[0].item() == pytest.approx(math.log(8), abs=1e-5)


class Fixed(torch.nn.Module):
    """A model that gives its inputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(10.0), dtype=torch.float64))

    def encode_image(self, x, normalize):
        return x

    def encode_text(self, x, normalize):
        return x


def test_sum_over_columns_weighs_each_column(vectors):
    model = Fixed()
    owners = torch.arange(4)
    texts = {
        "alt": Texts(vectors["text"], owners, weight=1.0),
        "caption": Texts(vectors["teacher_text"], owners, weight=0.5),
    }
    batch = Batch({"image": vectors["image"]}, texts)
    terms = Objective(Config(), model)(batch, Features(model, batch))
    one = paired_loss(vectors["image"], vectors["text"], torch.tensor(10.0))[0]
    two = paired_loss(vectors["image"], vectors["teacher_text"], torch.tensor(10.0))[0]
    assert terms["alt"].item() == pytest.approx(one.item())
    assert terms["caption"].item() == pytest.approx(two.item() / 2)


def plain_weighted(image: Tensor, text: Tensor, weight: Tensor, scale: float) -> Tensor:
    """ALIP's loss with loops: each row's two cross-entropies, weighted, over the number of rows."""
    s, total = scale * image @ text.T, torch.zeros((), dtype=image.dtype)
    for i in range(len(s)):
        total = total + weight[i] * (torch.logsumexp(s[i], 0) + torch.logsumexp(s[:, i], 0) - 2 * s[i, i]) / 2
    return total / len(s)


WEIGHT = torch.tensor([0.2, 1.0, 0.0, 1.7], dtype=torch.float64)


def test_weighted_loss_equals_its_formula_in_value_and_gradient(vectors):
    grads = []
    for loss in (
        lambda im, tx: paired_loss(im, tx, torch.tensor(10.0), WEIGHT)[0],
        lambda im, tx: plain_weighted(im, tx, WEIGHT, 10.0),
        lambda im, tx: multi_positive_loss(im, tx, torch.arange(4), torch.tensor(10.0), WEIGHT)[0],
    ):
        im, tx = (vectors[k].clone().requires_grad_() for k in ("image", "text"))
        loss(im, tx).backward()
        grads.append((loss(im, tx).detach(), im.grad, tx.grad))
    for ours in (grads[0], grads[2]):
        for got, plain in zip(ours, grads[1], strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-12)


def test_weights_of_one_change_no_value(vectors):
    scale, owners = torch.tensor(10.0), torch.tensor([0, 0, 1, 3])
    for weight in (torch.ones(4), torch.ones(4, dtype=torch.bool)):
        plain, ones = (paired_loss(vectors["image"], vectors["text"], scale, w)[0] for w in (None, weight))
        assert ones.item() == pytest.approx(plain.item(), rel=1e-12)
        many, ones = (
            multi_positive_loss(vectors["image"], vectors["text"], owners, scale, w)[0] for w in (None, weight)
        )
        assert ones.item() == pytest.approx(many.item(), rel=1e-12)


def weighted_batch(vectors, **columns) -> Batch:
    owners = torch.arange(4)
    texts = {"alt": Texts(vectors["text"], owners), "caption": Texts(vectors["teacher_text"], owners, weight=0.5)}
    return Batch({"image": vectors["image"]}, texts, columns)


def test_each_text_source_has_its_weight_column_and_null_counts_one(vectors):
    model, batch = Fixed(), weighted_batch(vectors, w_alt=WEIGHT, w_caption=[0.3, None, 2, 0.0])
    objective = Objective(Config(weights={"alt": "w_alt", "caption": "w_caption"}), model)
    assert objective.columns() == ["w_alt", "w_caption"]
    terms = objective(batch, Features(model, batch))
    second = torch.tensor([0.3, 1.0, 2.0, 0.0], dtype=torch.float64)
    assert terms["alt"].item() == pytest.approx(plain_weighted(vectors["image"], vectors["text"], WEIGHT, 10.0).item())
    wanted = plain_weighted(vectors["image"], vectors["teacher_text"], second, 10.0).item() / 2
    assert terms["caption"].item() == pytest.approx(wanted, rel=1e-6)  # a list comes as float32
    whole = weighted_batch(vectors, w_alt=torch.tensor([1, 0, 2, 1]), w_caption=[1, 0, 2, 1])  # integers
    terms = objective(whole, Features(model, whole))
    wanted = plain_weighted(vectors["image"], vectors["text"], torch.tensor([1.0, 0, 2, 1], dtype=torch.float64), 10.0)
    assert terms["alt"].item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "column", "message"),
    [
        ({"text": "w"}, WEIGHT, "names 'text', and the text sources are alt, caption"),
        ({"alt": "w"}, -WEIGHT, "'w' cannot weigh pictures"),
        ({"alt": "w"}, WEIGHT * float("nan"), "'w' cannot weigh pictures"),
        ({"alt": "w"}, WEIGHT.reshape(2, 2), "one number a row"),
        ({"alt": "w"}, [[0.5], None, [1.0], None], "one number a row"),
    ],
)
def test_weights_that_cannot_be_used_are_told(vectors, weights, column, message):
    model, batch = Fixed(), weighted_batch(vectors, w=column)
    with pytest.raises(ConfigError, match=message):
        Objective(Config(weights=weights), model)(batch, Features(model, batch))


def test_a_weighted_recipe_trains_on_the_columns_of_a_table(tmp_path, monkeypatch, capsys):
    """Weights 0 for all but a few pictures, whose loss alone is left; null counts 1. A column of nothing but 0 is told."""
    write_pairs(SceneConfig(n=16, size=48, mix="mild"), tmp_path / "t.lance")
    pairs = Pairs.open(tmp_path / "t.lance").add_column("w", [None] * 4 + [0.0] * 8 + [1.0] * 4, type="float32")
    pairs.add_column("zero", [0.0] * 16, type="float32")
    vit = {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1}
    recipe = {
        "name": "weighted",
        "data": {"pairs": pairs.path, "threads": 1, "text": {"columns": {"alt": 1, "captions": 1}, "rule": "sum"}},
        "towers": {"custom": {"embed_dim": 16, "vision_cfg": vit, "text_cfg": text}},
        "objectives": {"contrastive": {"weights": {"alt": "w", "captions": "zero"}}},
        "train": {"batch": 16, "samples": 48, "warmup": 1, "log_every": 1, "device": "cpu"},
    }
    monkeypatch.setattr("cutline.objectives.collapse.PATIENCE", 2)
    loop.train(Recipe.model_validate(recipe), tmp_path / "run")
    said = [x for x in capsys.readouterr().err.splitlines() if "all weights in the column 'zero' are 0" in x]
    assert len(said) == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    recipe["objectives"]["contrastive"]["weights"]["alt"] = "weight_alt"
    with pytest.raises(
        ConfigError, match=r"objectives.contrastive needs .*'weight_alt'.*cutline caption select PAIRS --rule alip"
    ):
        loop.train(Recipe.model_validate(recipe), tmp_path / "other", show=False)
    for row in rows:
        assert row["contrastive/captions"] == 0
        assert row["loss"] == pytest.approx(row["contrastive/alt"])
        assert 0.3 * math.log(16) < row["loss"] < 0.7 * math.log(16)  # about half of the pictures count


TWO = (
    LEAVE
    + """
import json, os, sys, torch, torch.distributed as dist
from cutline.objectives.contrastive import paired_loss, multi_positive_loss
dist.init_process_group("gloo")
rank = dist.get_rank()
data = torch.load(sys.argv[1], weights_only=True)
mine = slice(2 * rank, 2 * rank + 2)
owners = data["owners"]
own = (owners >= 2 * rank) & (owners < 2 * rank + 2)
results = []
for weight in (None, data["weight"][mine]):
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
    scale = torch.nn.Parameter(torch.tensor(10.0, dtype=torch.float64))
    if sys.argv[2] == "paired":
        loss, _ = paired_loss(net(data["image"][mine]), data["text"][mine], scale, weight)
    else:
        image = net(data["image"][mine])
        loss, _ = multi_positive_loss(image, data["texts"][own], owners[own] - 2 * rank, scale, weight)
    loss.backward()
    for p in (net.weight, scale):
        dist.all_reduce(p.grad); p.grad /= 2
    results.append({"loss": loss.item(), "weight": net.weight.grad.tolist(), "scale": scale.grad.item()})
print(json.dumps(results))
leave()
"""
)


@pytest.mark.parametrize("kind", ["paired", "many"])
def test_two_processes_equal_one_on_the_joined_batch(vectors, tmp_path, kind):
    """Without weights, and with them."""
    torch.manual_seed(1)
    owners = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    texts = F.normalize(torch.randn(7, 6, dtype=torch.float64), dim=1)
    torch.save({**vectors, "owners": owners, "texts": texts, "weight": WEIGHT}, tmp_path / "data.pt")
    ranks = [json.loads(o) for o in on_two_processes(TWO, str(tmp_path / "data.pt"), kind, folder=tmp_path)]
    for i, weight in enumerate((None, WEIGHT)):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
        scale = torch.nn.Parameter(torch.tensor(10.0, dtype=torch.float64))
        if kind == "paired":
            loss, _ = paired_loss(net(vectors["image"]), vectors["text"], scale, weight)
        else:
            loss, _ = multi_positive_loss(net(vectors["image"]), texts, owners, scale, weight)
        loss.backward()
        assert sum(r[i]["loss"] for r in ranks) / 2 == pytest.approx(loss.item(), rel=1e-10)
        for r in ranks:
            gradient = torch.tensor(r[i]["weight"], dtype=torch.float64)
            torch.testing.assert_close(gradient, net.weight.grad, rtol=1e-9, atol=1e-12)
            assert r[i]["scale"] == pytest.approx(scale.grad.item(), rel=1e-9)


LOCAL = (
    LEAVE
    + """
import sys, torch, torch.distributed as dist
from cutline.objectives.contrastive import paired_loss
dist.init_process_group("gloo")
data = torch.load(sys.argv[1], weights_only=True)
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
print(paired_loss(data["image"][mine], data["text"][mine], torch.tensor(10.0))[0].item())
leave()
"""
)


def test_each_process_has_the_local_loss_of_the_reference_values(vectors, tmp_path):
    torch.save(vectors, tmp_path / "data.pt")
    first, second = (float(o) for o in on_two_processes(LOCAL, str(tmp_path / "data.pt"), folder=tmp_path))
    assert first == pytest.approx(3.2941582815, abs=1e-9)
    assert second == pytest.approx(5.5227801244, abs=1e-9)


def test_a_batch_of_one_picture_has_no_negatives_and_a_finite_gradient():
    image = F.normalize(torch.randn(1, 6), dim=1).requires_grad_()
    loss, _ = multi_positive_loss(
        image, F.normalize(torch.randn(3, 6), dim=1), torch.zeros(3, dtype=torch.long), torch.tensor(5.0)
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(image.grad).all()
