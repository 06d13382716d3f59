"""Classification by a column of labels: the formulas, what counts, errors, two processes, training on scenes, recipe."""

import json
import math
from pathlib import Path

import pytest
import torch
from objectives_made import recipe, rows_of, same_values_and_gradients
from processes import LEAVE, on_two_processes
from torch import Tensor

from cutline import towers
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.objectives import supervised
from cutline.objectives.base import Batch, Features
from cutline.objectives.supervised import Config, Objective
from cutline.train import loop
from cutline.train.recipe import Recipe
from cutline.train.stream.stream import collate

CLASSES = ["cat", "dog", 3]
MANY = [["dog", 3], [], None, ["cat", "cat"], ["zebra"], "dog"]
MANY_IDS = [[1, 2], [], None, [0, 0], [], [1]]
ONE = ["dog", None, 3, "", ["cat"], "zebra"]
ONE_IDS = [[1], None, [2], None, [0], None]
RECIPES = Path(__file__).parents[2] / "recipes"


def made(**options: object) -> tuple[towers.Model, Objective]:
    torch.manual_seed(0)
    model = towers.build(towers.TowerConfig.model_validate(recipe()["towers"])).double()
    return model, Objective(Config.model_validate({"labels": "tags", "classes": CLASSES} | options), model).double()


def batch_of(values: list[object], first: int = 0, last: int = 6) -> Batch:
    images = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(1)).double()[first:last]
    mine = values[first:last]
    return Batch({"image": images}, {}, {"tags": collate(mine)}, [f"k{i}" for i in range(first, last)])


def ids(values: list[object], **options: object) -> list[list[int] | None]:
    return made(**options)[1].labels(Batch({}, {}, {"tags": collate(values)}))


def plain(logits: Tensor, given: list[list[int] | None], single: bool, positive: float) -> Tensor:
    """The docstring's formulas, picture by picture and class by class."""
    losses = []
    for row, classes in zip(logits, given, strict=True):
        if classes is None:
            continue
        if single:
            losses.append(-(row[classes[0]].exp() / row.exp().sum()).log())
            continue
        p = 1 / (1 + (-row).exp())
        losses.append(
            torch.stack([-positive * q.log() if c in classes else -(1 - q).log() for c, q in enumerate(p)]).sum()
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("single", "positive"), [(False, 1.0), (False, 3.0), (True, 1.0)])
def test_value_and_gradients_equal_the_formula(single, positive):
    values, given = (ONE, ONE_IDS) if single else (MANY, MANY_IDS)
    model, objective = made(single=single, positive=positive)
    batch = batch_of(values)

    def by_hand() -> Tensor:
        picture = model.encode_image(batch.views["image"])
        unit = picture / picture.square().sum(1, keepdim=True).sqrt()
        return plain(4 * unit @ objective.head.weight.T + objective.head.bias, given, single, positive)

    losses = (lambda: objective(batch, Features(model, batch))["labels"], by_hand)
    names = same_values_and_gradients(model, objective, losses, rtol=1e-9, atol=1e-12)
    assert names >= {"head.weight", "head.bias", "proj", "conv1.weight"}
    assert objective.logged["labelled"].item() == pytest.approx(sum(g is not None for g in given) / 6)
    assert objective.logged["unknown"].item() == pytest.approx(1 / 4 if single else 1 / 6)


def test_several_labels_start_at_one_class_a_picture():
    bias = made(classes=[f"c{i}" for i in range(50)])[1].head.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full((50,), 1 / 50).double())
    assert made(single=True)[1].head.bias.abs().max() < 0.3


def test_what_is_predicted_is_logged():
    model, objective = made()
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.copy_(torch.tensor([1.0, 1.0, -1.0]))  # a cat and a dog in every picture
    objective(batch_of(MANY), Features(model, batch_of(MANY)))
    assert objective.logged["precision"].item() == pytest.approx(3 / 10)  # 5 pictures count
    assert objective.logged["recall"].item() == pytest.approx(3 / 4)
    model, objective = made(single=True)
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    objective(batch_of(ONE), Features(model, batch_of(ONE)))
    assert objective.logged["accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (MANY, MANY_IDS),
        ([3, 4, 3], [[0], [], [0]]),  # collated to a tensor
        ([[3, 5], [5, 3]], [[0, 1], [1, 0]]),
        ([[], []], [[], []]),
        ([[3], [3, 5], None], [[0], [0, 1], None]),
        (["", None, [None, ""], ["3"]], [None, None, [], []]),  # "3" is not 3
    ],
)
def test_forms_of_labels(values, found):
    assert ids(values, **({} if values is MANY else {"classes": [3, 5]})) == found


def test_a_field_of_structs_is_the_label():
    scene = [[{"name": "cat", "box": 1}, {"name": None}, {"name": "dog"}], [], None, {"name": 3}]
    assert ids(scene, field="name") == [[0, 1], [], None, [2]]
    with pytest.raises(ConfigError, match="column 'tags'.*has no field 'title'"):
        ids(scene, field="title")
    with pytest.raises(ConfigError, match="objectives.supervised.field names the one"):
        ids(scene)


@pytest.mark.parametrize(
    "values", [[1.5, 2.0], [True, False], [b"cat", None], [{"cat": 1}, None], [["cat", 0.5], None]]
)
def test_what_is_no_label_is_refused(values):
    with pytest.raises(ConfigError, match="objectives.supervised.labels names the column 'tags'.*whole numbers, strings or lists"):  # fmt: skip
        ids(values)


def test_single_takes_one_label_and_names_the_row_that_has_more():
    model, objective = made(single=True)
    batch = batch_of(["dog", ["cat", 3], None, None, None, None])
    with pytest.raises(ConfigError, match="labels \\['cat', 3\\] \\(row 'k1'\\), and `single` is set"):
        objective(batch, Features(model, batch))


def test_labels_that_are_no_class_are_counted_and_named(monkeypatch):
    monkeypatch.setattr(supervised, "JUDGED", 8)
    model, objective = made()
    for _ in range(2):  # six labels each, one of which is no class
        assert objective.warning == ""
        objective(batch_of(MANY), Features(model, batch_of(MANY)))
    assert "16.7% of those so far, for example 'zebra'" in objective.warning
    strangers = Batch({}, {}, {"tags": [[f"t{i}" for i in range(9)]]})
    with pytest.raises(ConfigError, match="no label that is a class among its first 9: it has 't0', 't1'.*'t4' and the classes are 'cat', 'dog', 3 "):  # fmt: skip
        made()[1].labels(strangers)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("values", [["dog"], [None], [["dog"]]])
def test_one_sample_and_none_that_counts(single, values):
    model, objective = made(single=single)
    batch = batch_of(values, 0, 1)
    loss = objective(batch, Features(model, batch))["labels"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert (loss.item() == 0) == (values == [None])
    assert objective.head.weight.grad is not None  # also where it is 0, as other processes may have labels
    assert all(math.isfinite(v) for v in objective.logged.values())


def test_classes_from_a_file(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(CLASSES))
    assert made(classes=str(path))[1].place == {"cat": 0, "dog": 1, 3: 2}
    for text in ('{"cat": 1}', "[]", "[1.5]", '[""]', "[true]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="classes.json' must be a list of whole numbers or strings"):
            made(classes=str(path))
    with pytest.raises(ConfigError, match="in the recipe has 'cat' twice"):
        made(classes=["cat", "dog", "cat"])
    with pytest.raises(ConfigError, match="two classes or more"):
        made(classes=["cat"], single=True)
    for text in ("[", None):
        path.write_text(text) if text else path.unlink()
        with pytest.raises(DataError, match="cannot read the classes of objectives.supervised.*JSON list of labels"):
            made(classes=str(path))


def test_a_missing_column_is_told_with_the_objective_and_what_makes_it(tmp_path):
    values = recipe(supervised={"labels": "object", "classes": CLASSES})
    with pytest.raises(CutlineError) as error:
        loop.train(Recipe.model_validate(values), tmp_path / "run", show=False)
    for part in (
        "objectives.supervised",
        "'object'",
        "Did you mean 'objects'?",
        "cutline pairs create",
        "--field object=",
    ):
        assert part in str(error.value)


TWO = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[2:]
from test_supervised import MANY, ONE, batch_of, made
from cutline.objectives.base import Features
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for single, values in ((False, MANY), (True, ONE)):
    # the second process has labels of one picture; in the third round the first has none at all
    for cut, mine in ((4, values), (3, [None] * 3 + values[3:])):
        model, objective = made(single=single)
        batch = batch_of(mine, *((0, cut), (cut, 6))[rank])
        loss = objective(batch, Features(model, batch))["labels"]
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in [*objective.parameters(), *model.visual.parameters()]])
        both = torch.cat([loss.detach()[None], grads])
        dist.all_reduce(both)
        found[f"{single} {cut}"] = both / 2
torch.save(found, sys.argv[1] + str(rank))
""" + LEAVE + "leave()\n"  # fmt: skip


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """Value and gradient of every parameter, where the processes have different numbers of labelled pictures."""
    here = Path(__file__).parent
    on_two_processes(TWO, str(tmp_path / "out"), str(here), str(here.parent), folder=tmp_path)
    ranks = [torch.load(tmp_path / f"out{r}", weights_only=True) for r in range(2)]
    for single, values in ((False, MANY), (True, ONE)):
        for cut, joined in ((4, values), (3, [None] * 3 + values[3:])):
            model, objective = made(single=single)
            batch = batch_of(joined)
            loss = objective(batch, Features(model, batch))["labels"]
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in [*objective.parameters(), *model.visual.parameters()]])
            for found in ranks:
                torch.testing.assert_close(found[f"{single} {cut}"], torch.cat([loss.detach()[None], grads]), rtol=1e-9, atol=1e-12)  # fmt: skip


def test_it_trains_beside_texts_on_the_names_of_scenes(tmp_path):
    """The tower sees a picture once for both; on a few scenes, seen often, names are learnt."""
    names = ["apple", "banana", "pear", "dog", "cat", "cow", "car", "taxi"]
    values = recipe(contrastive={}, supervised={"labels": "objects", "field": "name", "classes": names})
    values["data"] |= {"pairs": "scenes:n=16,size=48,seed=1,objects=24"}
    values["train"] |= {"samples": 8 * 160}
    run = loop.prepare(Recipe.model_validate(values), tmp_path / "one", resume=False)
    looks: list[int] = []
    run.trainee.model.visual.conv1.register_forward_hook(lambda *_: looks.append(1))
    loop.train_step(run, next(run.stream.batches()))
    assert len(looks) == 1
    rows = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "run", show=False))
    last = [r["supervised/labels"] for r in rows[-8:]]
    assert sum(last) < 0.7 * sum(r["supervised/labels"] for r in rows[:8])
    assert 0 < rows[-1]["supervised/unknown"] < 1  # there are 24 names, and 8 classes
    assert rows[-1]["supervised/labelled"] == 1
    assert rows[-1]["image/feature_std"] > 0.1
