"""What shows that training has collapsed, and when it is told."""

import pytest
import torch
from objectives_made import recipe, rows_of, stopped_and_resumed

from cutline import objectives
from cutline.objectives import collapse
from cutline.train import loop
from cutline.train.recipe import Recipe


@pytest.mark.parametrize("dim", [8, 3])
def test_spread_of_rows_that_point_everywhere(dim):
    eye = torch.eye(dim) * 5
    found = collapse.spread(torch.cat([eye, -eye]))
    assert found["feature_std"].item() == pytest.approx(1)
    assert found["effective_rank"].item() == pytest.approx(dim)


def test_spread_takes_rows_evenly_where_there_are_many():
    x = torch.zeros(5000, 4)
    x[::5, 0] = 1  # the rows that are looked at
    x[1::5, 1] = 1
    assert collapse.spread(x, most=1000)["feature_std"].item() == 0


def test_one_row_says_nothing_of_how_rows_differ():
    assert collapse.spread(torch.ones(1, 4)) == {}


@pytest.fixture
def same_of_every_picture(monkeypatch):
    """Runs whose image tower says the same of everything and cannot learn otherwise; four steps are long."""
    monkeypatch.setattr(collapse, "PATIENCE", 4)
    real = loop.prepare

    def prepare(*args, **kwargs):
        run = real(*args, **kwargs)
        run.trainee.model.visual.conv1.weight.requires_grad_(False).zero_()
        return run

    monkeypatch.setattr(loop, "prepare", prepare)


LABELS = {"labels": "objects", "field": "name", "classes": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("method", "options"),
    [("contrastive", {}), ("sigmoid", {}), ("catlip", {"classes": ["cat", "dog"]}), ("supervised", LABELS)],
)
@pytest.mark.parametrize("micro", [None, 3])
def test_embeddings_that_are_alike_are_told_whatever_is_trained(
    method, options, micro, same_of_every_picture, tmp_path, capsys
):
    values = recipe(**{method: options})
    values["train"] |= {"samples": 64, "micro_batch": micro}
    run = loop.train(Recipe.model_validate(values), tmp_path / "run")
    said = [x for x in capsys.readouterr().err.splitlines() if "training has collapsed or not begun" in x]
    assert len(said) == 1
    assert "step 4, and for 4 steps on end: the embeddings of all pictures are alike (feature std 0.0000" in said[0]
    assert all(row["image/feature_std"] < 1e-3 for row in rows_of(run))


def test_what_was_collapsed_before_a_kill_counts_after_it(same_of_every_picture, tmp_path):
    values = recipe(contrastive={})
    values["train"] |= {"samples": 48, "save_every": 2}
    stopped_and_resumed(values, tmp_path / "run", 3)
    state = loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=True)
    assert state.collapsed == {"image": 6, "contrastive": 0}


def test_features_that_differ_by_place_and_not_by_picture_are_told_of_masked(tmp_path):
    """Every patch of a picture differs from its others, and no picture from another: assignments tell places alone."""
    values = recipe(masked={"prototypes": 16, "hidden": 16, "bottleneck": 8})
    run = loop.prepare(Recipe.model_validate(values), tmp_path / "run", resume=False)
    batch = next(iter(run.stream.batches(until=1)))
    method = run.trainee.methods()["masked"]
    assert isinstance(method, objectives.masked.Objective)
    for tower in (method.student, method.tower.encoder):
        tower.visual.conv1.weight.data.zero_()
        tower.visual.positional_embedding.data.normal_()
    loop.train_step(run, batch)
    assert method.logged["entropy/mean"] - method.logged["entropy/each"] > collapse.LEAST_INFORMATION
    assert "the teacher says the same of every picture" in method.collapse
