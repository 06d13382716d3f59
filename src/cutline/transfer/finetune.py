"""Fine-tuning by a loss of outputs and targets.

When the encoder is frozen and batches are whole pictures, its features are computed once for every picture and its
mirror image, which gives the same numbers as computing them at every step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutline.objectives.gather import world
from cutline.progress import progress
from cutline.train.device import device_of
from cutline.transfer.batches import Batch, Batches, ahead
from cutline.transfer.loop import train
from cutline.transfer.model import Headed
from cutline.transfer.options import TransferConfig, autocast
from cutline.transfer.prepared import Prepared

CACHE_BYTES = 2 << 30  # frozen features kept at most

Loss = Callable[[Tensor, Tensor], Tensor]  # (output float32, targets of the batch) → scalar


def finetune(
    model: Headed, prepared: Prepared[Any], batches: Batches, loss: Loss, out: Path | None, resume: bool = False
) -> None:
    """`train` by a loss of outputs and targets, with the features of a frozen encoder computed once where they can be."""
    config: TransferConfig = prepared.config
    device, cast = device_of(config.device), autocast(config)
    model.to(device).train()
    kept = config.frozen and batches.whole
    cache = still_features(model, batches, config, config.flip, CACHE_BYTES) if kept else None
    batches.targets_only = cache is not None

    def value(batch: Batch) -> Tensor:
        with cast():
            outputs = _outputs(model, batch, cache, batches.how.crop)
        targets = batch.targets.to(device, non_blocking=True)
        return torch.stack([weight * loss(output.float(), targets) for weight, output in outputs]).sum()

    train(model, prepared, batches.iterate, value, out, resume)


def _outputs(
    model: Headed, batch: Batch, cache: list[Tensor] | None, size: tuple[int, int]
) -> list[tuple[float, Tensor]]:
    device = next(model.parameters()).device
    if cache is None:
        maps = model.features(model.normalise(batch.images.to(device, non_blocking=True)))
    else:
        maps = [m[batch.flips.long().to(device), batch.rows.to(device)] for m in cache]
    return model.outputs(maps, size)


@torch.no_grad()
def still_features(
    model: Headed, batches: Batches, config: TransferConfig, mirrored: bool, limit: float
) -> list[Tensor] | None:
    """Features of every training picture as it is, and mirrored if asked for, (1 or 2, N, …) each.

    Zeros for one that cannot be used, which no batch shows. None if they would take more than `limit` bytes.
    """
    device, cast = device_of(config.device), autocast(config)
    sides, count = 2 if mirrored else 1, len(batches.rows)
    parts = [range(first, min(first + config.batch, count)) for first in range(0, count, config.batch)]
    store: list[Tensor] = []
    with progress("features of the frozen encoder", count, "pictures", world()[0] == 0) as tick:
        for places, images in ahead(batches.pictures, parts, batches.threads):
            if images is None:
                continue
            x = model.normalise(images.to(device, non_blocking=True))
            for flip in range(sides):
                with cast():
                    maps = model.features(x.flip(3) if flip else x)
                if not store:
                    if sides * count * sum(m[0].nbytes for m in maps) > limit:
                        return None
                    store = [m.new_zeros((sides, count, *m.shape[1:])) for m in maps]
                for kept, m in zip(store, maps, strict=True):
                    kept[flip, places] = m
            tick(len(images))
    return store
