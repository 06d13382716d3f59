"""AdamW and learning-rate schedules, shared by pretraining and fine-tuning."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NO_DECAY = (
    "pos_embed",
    "positional_embedding",
    "cls_token",
    "class_embedding",
    "reg_token",
    "logit_scale",
    "logit_bias",
)


DROPS = (8 / 9, 26 / 27)  # of all steps, where schedule="drops" divides the rate by ten


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers (batch norms' own averages); `average_in` moves it."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


@torch.no_grad()
def average_in(average: AveragedModel, model: nn.Module) -> None:
    """A step of the average. Buffers that are not saved are constants and are copied: a causal mask holds -inf, and the mean of
    two of them is NaN."""
    average.update_parameters(model)
    saved, own = model.state_dict().keys(), dict(average.module.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved:
            own[name].copy_(buffer)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_of: Callable[[str], int] | None = None,
    num_layers: int = 0,
) -> list[dict[str, Any]]:
    """AdamW groups: no decay on norms, biases, scalars and positional embeddings; layer-wise learning-rate decay.

    A parameter of layer k gets lr · layer_decay^(num_layers + 1 − k) (BEiT, 2106.08254), where `layer_of(name)` gives
    k in 0 (embeddings) … num_layers (last block); anything `layer_of` maps to num_layers + 1 (heads) gets the full rate.
    Each group carries `scale`, its share of the learning rate, for `set_lr`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.ndim <= 1 or any(part in NO_DECAY for part in name.split(".")) else weight_decay
        scale = 1.0 if layer_of is None else layer_decay ** (num_layers + 1 - layer_of(name))
        group = groups.setdefault(
            (decay, scale), {"params": [], "weight_decay": decay, "scale": scale, "lr": lr * scale, "names": []}
        )
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set every group to `lr` times its own scale."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def schedule(
    step: int,
    total: int,
    warmup: int = 0,
    kind: Literal["cosine", "poly", "constant", "drops"] = "cosine",
    power: float = 1.0,
    floor: float = 0.0,
) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then cosine or polynomial decay to `floor`.

    "drops": a tenth from 8/9 of the steps on, a hundredth from 26/27 on (ViTDet's 163,889 and 177,546 of 184,375).
    """
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(total - warmup, 1)
    if kind == "constant":
        return 1.0
    if kind == "drops":
        return 0.1 ** sum(step >= share * total for share in DROPS)
    shape = 0.5 * (1 + math.cos(math.pi * t)) if kind == "cosine" else (1 - t) ** power
    return floor + (1 - floor) * shape
