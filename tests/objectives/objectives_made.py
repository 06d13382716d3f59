"""Small recipes and towers for the objectives' tests, and one step on a part of a batch."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutline import objectives
from cutline.objectives.base import Batch, Features, Texts
from cutline.train import loop
from cutline.train.recipe import Recipe


def recipe(text: dict[str, Any] | None = None, **methods: Any) -> dict[str, Any]:
    """Values of a `Recipe`: 24 steps of 8 scenes with towers of one layer, about a second."""
    return {
        "name": "test",
        "data": {"pairs": "scenes:n=64,size=48,seed=1", "cache": True, "threads": 1,
                 "text": text or {"columns": {"captions": 1}}},
        "towers": {
            "custom": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
                "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 1},
            }
        },
        "objectives": methods,
        "train": {"batch": 8, "samples": 192, "warmup": 2, "log_every": 1, "lr": 3e-3},
    }  # fmt: skip


TIMM = {  # pooled by average, class token and attention; with rotary positions
    "vit_tiny_patch16_224": "avg",
    "test_vit": "token",
    "test_vit3": "map",  # as SigLIP's
    "eva02_tiny_patch14_224": "avg",
}


def timm(name: str) -> dict[str, Any]:
    """`towers.custom` with one of timm's plain transformers."""
    size = 56 if name.startswith("eva02") else 48
    vision = {"timm_model_name": name, "timm_pool": TIMM[name], "timm_proj": "linear", "image_size": size}
    return recipe()["towers"]["custom"] | {"vision_cfg": vision, "custom_text": True}


def painted(images: Tensor, places: Tensor, patch: int) -> Tensor:
    """Pictures (B, 3, H, W) that differ at the patches `places` (B, n), each of `patch`² pixels."""
    other, side = images.clone(), images.shape[-1] // patch
    for picture, patches in enumerate(places.tolist()):
        for at in patches:
            top, left = at // side * patch, at % side * patch
            other[picture, :, top : top + patch, left : left + patch] = 9.0
    return other


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stopped_and_resumed(values: dict[str, Any] | Recipe, out: Path, step: int) -> Path:
    """A run that was interrupted before it took this step, and gone on with."""
    plan, real = Recipe.model_validate(values), loop.train_step

    def interrupted(run: loop.Run, batch: Batch) -> dict[str, float]:
        if run.step == step:
            raise KeyboardInterrupt
        return real(run, batch)

    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(plan, out, show=False)
    return loop.train(plan, out, resume=True, show=False)


def same_values_and_gradients(
    model: nn.Module, objective: nn.Module, losses: Sequence[Callable[[], Tensor]], **tolerance: float
) -> set[str]:
    """Assert that two ways to a loss agree in value and in all gradients of the image tower and the objective's own
    parameters; returns the names of those that have one."""
    found: list[dict[str, Any]] = []
    for loss in losses:
        model.zero_grad()
        objective.zero_grad()
        value = loss()
        value.backward()
        named = dict(model.visual.named_parameters()) | dict(objective.named_parameters())  # type: ignore[union-attr,operator]
        found.append({"value": value.detach()} | {n: p.grad for n, p in named.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], **tolerance)
    return set(found[0])


class Linears(nn.Module):
    """A model of one matrix a modality, float64, whose pictures and texts are vectors of 6 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.words = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0), dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-9.0, dtype=torch.float64))
        self.model_cfg = {"embed_dim": 6}

    def encode_image(self, x: Tensor, normalize: bool) -> Tensor:
        return F.normalize(self.visual(x), dim=1)

    def encode_text(self, x: Tensor, normalize: bool) -> Tensor:
        return F.normalize(self.words(x), dim=1)


OWNERS = {"paired": [0, 1, 2, 3], "many": [0, 0, 0, 1, 2, 3, 3]}  # texts of four pictures


def batch_of(kind: str, first: int = 0, last: int = 4) -> Batch:
    """Pictures first … last − 1 of four random ones, their texts, and what teachers of 4 and 3 numbers say of them."""
    draw = torch.Generator().manual_seed(1)
    image, said = (torch.randn(4, d, generator=draw, dtype=torch.float64) for d in (6, 7))
    text, told = (torch.randn(7, d, generator=draw, dtype=torch.float64) for d in (6, 7))
    weights = torch.rand(4, generator=draw, dtype=torch.float64)
    owners = torch.tensor(OWNERS[kind])
    own = ((owners >= first) & (owners < last)).nonzero().flatten()
    columns = {
        "teacher/image": said[first:last],
        "teacher/text/text": told[own],
        "teachers": [SimpleNamespace(width=4, logit_scale=8.0), SimpleNamespace(width=3, logit_scale=12.0)],
        "weight": weights[first:last],
    }
    texts = Texts(text[own], owners[own] - first, kind == "paired")
    return Batch({"image": image[first:last]}, {"text": texts}, columns)


def step(name: str, config: dict[str, Any], batch: Batch) -> tuple[Tensor, dict[str, nn.Parameter]]:
    """The loss of an objective of model and heads that are always the same, and all parameters with their gradients."""
    torch.manual_seed(0)
    model = Linears()
    objective = objectives.build(name, objectives.config_class(name)(**config), model).double()
    loss = torch.stack(list(objective(batch, Features(model, batch)).values())).sum()
    loss.backward()
    named = [*model.named_parameters(prefix="model"), *objective.named_parameters(prefix="objective")]
    return loss.detach(), {k: p for k, p in named if p.grad is not None}
