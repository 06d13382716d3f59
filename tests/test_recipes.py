"""Every recipe: the paper-scale ones take a step on meta tensors, those for scenes train, resume and run on two processes."""

import json
import math
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from processes import LEAVE, on_two_processes
from reinforce_made import run as run_work
from torch.utils.flop_counter import FlopCounterMode

from cutline import towers
from cutline.captions.reinforce import ReinforceConfig, reinforce_work
from cutline.config import dump
from cutline.objectives import base, captioning, experts, sigmoid, teacher
from cutline.pairs import Pairs
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.study.plan import load_plan
from cutline.train import loop
from cutline.train.recipe import Recipe

sys.path.append(str(Path(__file__).parent / "objectives"))
from objectives_made import rows_of, stopped_and_resumed

RECIPES = Path(__file__).parents[1] / "recipes"
SCENES = sorted(p.stem for p in (RECIPES / "scenes").glob("*.yaml"))

# Trained parameters (millions) and work of a picture and its texts (GFLOP, forward and backward). CLIP has 149.6 M, SigLIP 203.2 M.
PAPER = {
    "clip-b16": (150, 131),
    "siglip-b16": (203, 139),
    "silc-b16": (172, 522),
    "tips-b16": (178, 408),
    "xclip-b16": (178, 115),
    "mobileclip-dr-12m": (150, 131),
    "cliptex-b16": (150, 122),
    "mae-b16": (112, 58),
    "supervised-b16": (86, 98),
    "catlip-b16": (86, 98),
    "coca-b32": (254, 99),
}


def meta_batch(plan: Recipe, trainee: loop.Trainee, size: int) -> base.Batch:
    """Two pictures without values, and all that the recipe's objectives ask for."""
    methods = trainee.methods().values()
    views = {"image": torch.empty(2, 3, size, size)}
    for name, view in (named for m in methods for named in m.views().items()):
        side = view.size or size
        views[name] = torch.empty(2 * view.count, 3, side, side)
    tokens, owners = torch.zeros(2, trainee.model.model_cfg["text_cfg"]["context_length"], dtype=torch.long), torch.arange(2)  # fmt: skip
    weights = plan.data.text.weights if any(m.needs_text for m in methods) else {}
    names = weights if plan.data.text.rule == "sum" else dict.fromkeys(weights and ["text"], 1.0)
    texts = {source: base.Texts(tokens, owners, weight=w) for source, w in names.items()}
    shapes = {"segment": (2, 56, 56), "depth": (2, 56, 56), "normals": (2, 3, 56, 56)}
    columns: dict[str, Any] = {m.column: torch.zeros(shapes[m.kind]) for o in methods for m in o.maps()}
    vectors = {f"teacher/text/{source}": torch.empty(2, 1536) for source in texts}
    columns |= {"teacher/image": torch.empty(2, 1536), "label": ["a", "b"], **vectors}
    columns["teachers"] = [SimpleNamespace(width=768, logit_scale=100.0)] * 2
    return base.Batch(views, texts, columns)


def all_tokens(self: Any, states: torch.Tensor, labels: torch.Tensor, projection: torch.Tensor) -> Any:
    """Captioning's loss without looking which tokens are padding."""
    loss = F.cross_entropy((states @ projection).flatten(0, 1), labels.flatten())
    return loss, loss.detach(), loss.detach()


@pytest.mark.parametrize("name", sorted({p.stem for p in RECIPES.glob("*.yaml")} - {"flickr8k-small"}))
def test_paper_recipes_parse_build_and_take_one_step(name, monkeypatch, tmp_path):
    """On meta tensors, which have shapes and no values; parameters and work per picture are printed."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    monkeypatch.setattr(sigmoid, "start", lambda *_: None)  # looks at values, as the next two do
    monkeypatch.setattr(experts, "_invariant", lambda said, *_: said.sum())
    monkeypatch.setattr(captioning.Objective, "loss", all_tokens)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text(json.dumps(list(range(1000, 1400))))
    (tmp_path / "labels.json").write_text('["a", "b", "c"]')
    plan = Recipe.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        model = towers.build(plan.towers.model_copy(update={"pretrained": None}), device="meta")
    with torch.device("cpu" if plan.objectives.catlip else "meta"):  # whose vocabulary has values
        trainee = loop.Trainee(model, plan).to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        size = towers.load_encoder(model).size
        trainee(meta_batch(plan, trainee, size))[0].backward()
    trained = {n: p.numel() for n, p in trainee.named_parameters() if p.grad is not None}
    millions, work = sum(trained.values()) / 1e6, counter.get_total_flops() / 2e9
    print(f"{name}: {millions:.0f} M trained parameters, {work:.0f} GFLOP per picture")
    assert (round(millions), round(work)) == PAPER[name]
    texts = any(o.needs_text for o in trainee.methods().values()) and plan.objectives.catlip is None
    left = {n for n, p in trainee.named_parameters() if p.requires_grad and n not in trained}
    assert not {n for n in left if n.startswith("objectives.") or (n.startswith("model.visual.") and n != "model.visual.proj")}  # fmt: skip
    assert texts != bool(left)  # the text tower is built and not trained where there are no texts
    shared = {m.tower for m in trainee.methods().values() if isinstance(m, teacher.SelfDistillation)}
    assert len(shared) <= 1


def small(name: str, table: Path | str = "scenes.lance") -> dict[str, Any]:
    """The recipe for scenes with 32 of them and three steps of 8."""
    values: dict[str, Any] = yaml.safe_load((RECIPES / "scenes" / f"{name}.yaml").read_text())
    values["data"]["pairs"] = values["data"]["pairs"].replace("n=12800", "n=32").replace("scenes.lance", str(table))
    values["data"]["threads"] = 1
    if name == "experts":  # as its comment says; with labels in a table it is trained by the test of the command
        values["data"]["pairs"] = "scenes:n=32,size=64,seed=1,objects=48"
        values["objectives"]["experts"]["segment"]["column"] = "semantic"
    values["train"] |= {"batch": 8, "samples": 24, "save_every": 1, "log_every": 1}
    return values


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory) -> Path:
    """The table of `recipes/scenes/distill.yaml`, with what a small random CLIP says of it."""
    folder = tmp_path_factory.mktemp("reinforced")
    write_pairs(parse_spec("scenes:n=32,size=64,objects=48"), folder / "scenes.lance")
    torch.manual_seed(0)
    towers.save(towers.build(towers.TowerConfig(model="vit-tiny-64")), folder / "teacher")
    config = ReinforceConfig(teachers=[str(folder / "teacher")], texts=["captions"], augmentations=2)
    pairs = Pairs.open(folder / "scenes.lance")
    run_work(pairs, reinforce_work(pairs, config))
    return folder / "scenes.lance"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reinforced) -> dict[str, list[dict[str, Any]]]:
    """What every recipe for scenes logs in three steps without a stop."""
    folder, rows = tmp_path_factory.mktemp("whole"), {}
    for name in SCENES:
        rows[name] = rows_of(loop.train(Recipe.model_validate(small(name, reinforced)), folder / name, show=False))
        shutil.rmtree(folder / name)  # its checkpoints are 100 to 400 MB
    return rows


@pytest.mark.parametrize("name", SCENES)
def test_recipes_for_scenes_train_and_resume_exactly(name, whole, reinforced, tmp_path):
    rows = whole[name]
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert rows[-1]["skipped_steps"] == 0
    objectives = small(name)["objectives"].keys()
    assert objectives <= {k.split("/")[0] for k in rows[0]}
    again = stopped_and_resumed(small(name, reinforced), tmp_path / "run", 2)
    assert [r["loss"] for r in rows_of(again)] == [r["loss"] for r in rows]


@pytest.mark.parametrize("name", SCENES)
def test_a_batch_of_one_picture_takes_a_step(name, reinforced, tmp_path):
    """As a process has it when there are as many of them as pictures in a batch."""
    plan = Recipe.model_validate(small(name, reinforced))
    plan.train.batch = 1  # which a recipe for one process may not ask for
    run = loop.prepare(plan, tmp_path / "run", resume=False)
    log = loop.train_step(run, next(iter(run.stream.batches(until=1))))
    assert all(math.isfinite(v) for v in log.values()), log
    assert run.bad == 0


TWO = (
    LEAVE
    + """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import torch.distributed as dist
from cutline.config import load
from cutline.train.recipe import Recipe
from cutline.train.loop import train
dist.init_process_group("gloo")
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    train(load(Recipe, path), Path(sys.argv[1]) / path.stem, show=False)
leave()
"""
)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, reinforced) -> dict[str, list[dict[str, Any]]]:
    """The same on two processes, one after the other."""
    folder = tmp_path_factory.mktemp("two")
    for name in SCENES:
        (folder / f"{name}.yaml").write_text(dump(Recipe.model_validate(small(name, reinforced))))
    on_two_processes(TWO, str(folder), folder=folder)
    rows = {name: rows_of(folder / name) for name in SCENES}
    shutil.rmtree(folder)
    return rows


@pytest.mark.parametrize("name", SCENES)
def test_recipes_for_scenes_train_on_two_processes_as_on_one(name, whole, on_two):
    """But for the patches that masked and mae draw, each process for its own pictures."""
    one, two = whole[name], on_two[name]
    assert len(one) == len(two) == 3
    drawn = ("masked/", "mae/")
    names = [k for k in one[0] if k.split("/")[0] in small(name)["objectives"] and not k.startswith(drawn)]
    first = {k: two[0][k] for k in names if "feature_std" not in k and "effective_rank" not in k}
    # Shares of words and labels are of each process's pictures, and so is their mean.
    first = {k: v for k, v in first.items() if not k.endswith(("precision", "recall", "absrel"))}
    assert first == pytest.approx({k: one[0][k] for k in first}, rel=2e-3, abs=1e-4)
    tolerance = 0.1 if {"masked", "mae"} & small(name)["objectives"].keys() else 0.02
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=tolerance)


def test_the_names_of_the_supervised_recipe_are_those_of_its_objects():
    from cutline.scenes.layout import kinds_of
    from cutline.scenes.objects import OBJECTS

    names = [OBJECTS[k].name for k in kinds_of(48)]
    assert small("supervised")["objectives"]["supervised"]["classes"] == names
    study = load_plan(RECIPES / "studies" / "scenes-objectives.yaml")
    assert study.recipe("supervised", 0).objectives.supervised.classes == names


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_studies_parse_with_every_arm(path):
    assert load_plan(path).tasks
