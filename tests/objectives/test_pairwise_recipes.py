"""Recipes of sigmoid, distill and nclip: the paper's take a step on meta tensors, those for scenes on scenes."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from objectives_made import rows_of
from torch.utils.flop_counter import FlopCounterMode

from cutline import towers
from cutline.objectives import base, sigmoid
from cutline.train import loop
from cutline.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["siglip-b16", "mobileclip-dr-12m", "xclip-b16"])
def test_paper_recipes_parse_build_and_take_one_step(name, monkeypatch):
    """On meta tensors, which have shapes and no values; parameters and work per picture are printed."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    monkeypatch.setattr(sigmoid, "start", lambda *_: None)  # which looks at values; the SigLIP tower has its bias
    plan = Recipe.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        trainee = loop.Trainee(towers.build(plan.towers, device="meta"), plan)
        context = trainee.model.model_cfg["text_cfg"]["context_length"]
        tokens, owners = torch.zeros(2, context, dtype=torch.long), torch.arange(2)
        texts = {source: base.Texts(tokens, owners, weight=w) for source, w in plan.data.text.weights.items()}
        vectors = {f"teacher/text/{source}": torch.empty(2, 1536) for source in texts}
        teachers = [SimpleNamespace(width=768, logit_scale=100.0)] * 2
        columns = {"teacher/image": torch.empty(2, 1536), "teachers": teachers, **vectors}
        with FlopCounterMode(display=False) as counter:
            trainee(base.Batch({"image": torch.empty(2, 3, 224, 224)}, texts, columns))[0].backward()
    count = sum(p.numel() for p in trainee.parameters())
    print(f"{name}: {count / 1e6:.0f} M parameters, {counter.get_total_flops() / 2e9:.0f} GFLOP per picture")
    assert all(p.grad is not None for p in trainee.parameters())
    assert 149e6 < count < 300e6  # the towers, and the heads of nCLIP


@pytest.mark.parametrize("name", ["sigmoid", "xclip"])
def test_recipes_for_scenes_take_one_step(name, tmp_path):
    values = yaml.safe_load((RECIPES / "scenes" / f"{name}.yaml").read_text())
    values["data"]["pairs"] = values["data"]["pairs"].replace("n=12800", "n=16")
    values["train"] |= {"batch": 8, "samples": 8}
    row = rows_of(loop.train(Recipe.model_validate(values), tmp_path / "run", show=False))[0]
    assert math.isfinite(row["loss"])
    assert row["skipped_steps"] == 0
    assert values["objectives"].keys() <= {k.split("/")[0] for k in row}
