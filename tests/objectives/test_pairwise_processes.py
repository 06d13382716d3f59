"""Objectives that compare samples: two gloo processes equal one on the joined batch, in value and in every gradient."""

import json
from pathlib import Path

import pytest
import torch
from objectives_made import OWNERS, batch_of, recipe, rows_of, step, stopped_and_resumed
from processes import LEAVE, on_two_processes

from cutline.config import dump
from cutline.train import loop
from cutline.train.recipe import Recipe

METHODS = {
    "contrastive": {"chunk": 1, "weights": {"text": "weight"}},
    "sigmoid": {"chunk": 1},
    "distill": {"chunk": 1},
    "nclip": {"prototypes": 5, "hidden": 8, "bottleneck": 4},
}

# Processes hold pictures 0, 1 and 2, 3; with several texts a picture, four and three texts.
TWO = (
    LEAVE
    + """
import json, sys, torch, torch.distributed as dist
sys.path += sys.argv[2:]
from objectives_made import OWNERS, batch_of, recipe, rows_of, step
from cutline.objectives.sigmoid import sigmoid_loss
from test_pairwise_processes import METHODS
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for name, config in METHODS.items():
    for kind in OWNERS:
        loss, parameters = step(name, config, batch_of(kind, 2 * rank, 2 * rank + 2))
        for p in parameters.values():
            dist.all_reduce(p.grad)
        found[f"{name} {kind}"] = loss.item(), {k: (p.grad / 2).tolist() for k, p in parameters.items()}
data = torch.load(sys.argv[1], weights_only=True)
mine = slice(2 * rank, 2 * rank + 2)
t = torch.tensor(10.0, dtype=torch.float64)
value = sigmoid_loss(data["image"][mine], data["text"][mine], torch.arange(2), t, -t, True, None)[0].item()
print(json.dumps([found, value]))
leave()
"""
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    """What each process found for every method and kind, and its loss of the reference values."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    torch.save(request.getfixturevalue("reference"), folder / "data.pt")
    return [
        json.loads(o)
        for o in on_two_processes(TWO, str(folder / "data.pt"), str(here), str(here.parent), folder=folder)
    ]


@pytest.fixture(scope="module")
def reference():
    import numpy as np

    def make(phase: float) -> torch.Tensor:
        x = np.sin(0.7 * np.arange(24).reshape(4, 6) + phase)
        return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True))

    return {"image": make(0.0), "text": make(1.3)}


@pytest.mark.parametrize("kind", OWNERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_on_the_joined_batch(ranks, method, kind):
    loss, parameters = step(
        method, {**METHODS[method], **({"chunk": None} if "chunk" in METHODS[method] else {})}, batch_of(kind)
    )
    found = [r[0][f"{method} {kind}"] for r in ranks]
    assert sum(f[0] for f in found) / 2 == pytest.approx(loss.item(), rel=1e-10)
    assert found[0][0] != pytest.approx(loss.item(), rel=1e-3)  # each has a part of its own
    for _, grads in found:
        assert grads.keys() == parameters.keys()
        for name, p in parameters.items():
            torch.testing.assert_close(torch.tensor(grads[name], dtype=p.dtype), p.grad, rtol=1e-8, atol=1e-11)


def test_each_process_has_the_sigmoid_loss_of_the_reference_values(ranks):
    assert [r[1] for r in ranks] == pytest.approx([6.4223323492, 8.2677675248], abs=1e-9)
    assert sum(r[1] for r in ranks) / 2 == pytest.approx(7.3450499370, abs=1e-9)


def plan() -> Recipe:
    sizes = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
    values = recipe({"columns": {"alt": 1, "captions": 1}, "rule": "all"}, sigmoid={"chunk": 3}, nclip=sizes)
    values["train"] |= {"samples": 64, "save_every": 3, "lr": 1e-3}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 8 steps on one process."""
    return loop.train(plan(), tmp_path_factory.mktemp("whole") / "run", show=False)


def test_a_run_resumes_exactly_with_bias_and_heads(whole, tmp_path):
    """Stopped after step 5, two steps past the checkpoint."""
    stopped_and_resumed(plan(), tmp_path / "run", 5)
    assert [r["loss"] for r in rows_of(tmp_path / "run")] == [r["loss"] for r in rows_of(whole)]
    ends = [loop.prepare(plan(), run, resume=True).trainee.state_dict() for run in (whole, tmp_path / "run")]
    assert "model.logit_bias" in ends[0]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


TRAIN = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from cutline.config import load
from cutline.train.recipe import Recipe
from cutline.train.loop import train
train(load(Recipe, sys.argv[1]), Path(sys.argv[2]), show=False)
"""


def test_two_processes_train_like_one(whole, tmp_path):
    (tmp_path / "r.yaml").write_text(dump(plan()))
    on_two_processes(TRAIN, str(tmp_path / "r.yaml"), str(tmp_path / "two"), folder=tmp_path)
    for one, two in zip(rows_of(whole), rows_of(tmp_path / "two"), strict=True):
        for name in ("loss", "sigmoid/text", "sigmoid/bias", "nclip/cross/text", "nclip/entropy/mean/text"):
            assert two[name] == pytest.approx(one[name], abs=1e-3)
