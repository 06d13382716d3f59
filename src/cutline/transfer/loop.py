"""The training loop of all tasks: AdamW with layer-wise decay, warm-up, an average of the weights, checkpoints.

Under torchrun every process takes its share of each batch, gradients are averaged (DDP), and on GPUs batch norms
normalise over all of it. A run that was killed goes on from its last checkpoint to the bit, on as many processes.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from cutline.config import dump
from cutline.errors import ConfigError, DivergedError, TrainingError
from cutline.objectives.gather import broadcast, world
from cutline.progress import progress
from cutline.record import fingerprint, write_atomic
from cutline.train import checkpoint
from cutline.train.device import device_of
from cutline.train.metrics import cut_metrics
from cutline.train.optim import average_in, averaged, param_groups, schedule, set_lr
from cutline.transfer.data import Skip
from cutline.transfer.model import Transferred
from cutline.transfer.options import NO_NUMBER, TransferConfig
from cutline.transfer.prepared import Prepared

NONFINITE = 5  # losses in a row that are not finite before a run stops
LOG_EVERY = 10
SAVE_EVERY, SAVES = 500, 5  # steps between checkpoints at most, and checkpoints of a run at least, when not given

B = TypeVar("B", bound="Keyed")


class Keyed(Protocol):
    """A batch that can name its pictures."""

    keys: list[str]


def train(
    model: Transferred,
    prepared: Prepared[Any],
    batches: Callable[[int, int], Iterator[B]],
    loss: Callable[[B], Tensor],
    out: Path | None,
    resume: bool = False,
) -> None:
    """Train `model` in place by `prepared.config` and leave it in eval mode, with its weights' average if there is one.

    batches: this process's share of the batches start … stop - 1; loss: of a batch, a scalar. `out` gets recipe.yaml
    (the config, resolved), metrics.jsonl and, every `save_every` steps and at the end, a checkpoint; resume: go on from the
    last of these (without one, from the start). Raises `TrainingError` after `NONFINITE` losses or gradients in a row that are not
    finite (single ones are skipped and logged; `DivergedError`), and for a checkpoint of another config, encoder or data.
    """
    config: TransferConfig = prepared.config
    every = config.save_every or min(SAVE_EVERY, -(-prepared.steps // SAVES))
    with _regularised(model.encoder, config):
        run = _Run(model, prepared, loss, out)
        if resume:
            run.resume()
        if out is not None and world()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / "recipe.yaml", dump(config).encode())
        label = "training the head" if config.frozen else "fine-tuning"
        with progress(label, run.steps, "steps", world()[0] == 0, done=run.done) as tick, _Log(out, run) as log:
            for batch in batches(run.done, run.steps):
                number = run.step(batch, log)
                tick(1, f"loss {number:.3f}")
                if out is not None and (run.done % every == 0 or run.done == run.steps):
                    run.save()
        run.same_on_all()
        if run.average is not None:
            model.load_state_dict(run.average.module.state_dict())
    model.eval()


@contextmanager
def _regularised(encoder: Any, config: TransferConfig) -> Iterator[None]:
    """Drop path and gradient checkpointing, while training alone."""
    drop_path, checkpointing = (config.drop_path, config.grad_checkpointing) if not config.frozen else (0, False)
    if drop_path:
        encoder.set_drop_path(drop_path)
    if checkpointing:
        encoder.set_grad_checkpointing(True)
    try:
        yield
    finally:
        if drop_path:
            encoder.set_drop_path(0.0)
        if checkpointing:
            encoder.set_grad_checkpointing(False)


class _Trainee(nn.Module):
    """A batch's loss as a module, for DDP to wrap."""

    def __init__(self, model: Transferred, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(batch)


class _Run:
    """A training in progress on this process."""

    def __init__(
        self, model: Transferred, prepared: Prepared[Any], loss: Callable[[Any], Tensor], out: Path | None
    ) -> None:
        config: TransferConfig = prepared.config
        assert config.lr is not None
        rank, size = world()
        if config.batch % size:
            raise ConfigError(f"batch={config.batch} is not a multiple of the {size} processes.")
        device = device_of(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random numbers checkpoints keep
        model.to(device).train()
        self.model, self.config, self.lr, self.split = model, config, config.lr, prepared.split
        self.steps, self.warmup = prepared.steps, prepared.warmup
        self.checkpoints = (out or Path()) / "checkpoints"
        groups = param_groups(
            model, config.lr, config.weight_decay, config.layer_decay, model.layer_of, model.num_layers
        )
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        self.average = None
        if config.ema is not None:
            self.average = averaged(model, config.ema)
        self.trainee: nn.Module = _Trainee(model, loss)
        if size > 1:
            torch.manual_seed(config.seed + rank)  # dropout and drop path differ between processes
            if device.type == "cuda":
                convert_sync_batchnorm(model)  # timm's, which keeps the activations that its batch norms have in them
            self.trainee = nn.parallel.DistributedDataParallel(self.trainee, find_unused_parameters=True)
        self.done = self.bad = 0
        self.seconds, self.begun = 0.0, time.monotonic()
        # What a checkpoint must agree in for its run to go on.
        self.name = fingerprint(config.model_dump(mode="json", exclude=NO_NUMBER), prepared.data, model.source_hash)

    def step(self, batch: Any, log: "_Log") -> float:
        """One step of the optimiser; returns the loss, averaged over processes. One that is not finite, or whose gradient is
        not, leaves the model as it was."""
        lr = self.lr * schedule(self.done, self.steps, self.warmup, self.config.schedule, self.config.power)
        set_lr(self.optimiser, lr)
        statistics = [b.clone() for b in self.model.buffers()]  # of batch norms, which the forward pass moves
        value = self.trainee(batch)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        number = value.detach().float()
        if world()[1] > 1:
            dist.all_reduce(number)
            number /= world()[1]
        loss = float(number)
        finite = math.isfinite(loss) and math.isfinite(float(norm))
        if finite:
            self.optimiser.step()
            self.bad = 0
            if self.average is not None:
                average_in(self.average, self.model)
            self.model.after_step()
        else:
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        self.optimiser.zero_grad(set_to_none=True)
        if not finite:
            log(self.done, skipped="the loss or its gradient is not finite")
            self._refuse(batch.keys)
        elif self.done % LOG_EVERY == 0 or self.done == self.steps - 1:
            log(self.done, loss=loss, lr=lr, **{name: float(x) for name, x in self.model.logged.items()})
        self.done += 1
        return loss

    def _refuse(self, keys: list[str]) -> None:
        self.bad += 1
        if self.bad >= NONFINITE:
            raise DivergedError(
                f"the loss or its gradient was not finite {self.bad} times in a row, at step {self.done} with the pictures "
                f"{', '.join(keys)}. Lower lr={self.lr} or set clip=1.0."
            )

    def _progress(self) -> dict[str, Any]:
        seconds = self.seconds + time.monotonic() - self.begun
        skipped = json.dumps([(row, e.reason, str(e)) for row, e in sorted(self.split.skipped.copy().items())])
        known = {"step": self.done, "bad": self.bad, "seconds": seconds, "name": self.name, "skipped": skipped}
        return {"progress": known}

    def same_on_all(self) -> None:
        """Give all processes the first one's buffers: averages of batch norms that only see their own share."""
        for buffer in self.model.buffers():
            broadcast(buffer)
        for buffer in self.average.buffers() if self.average is not None else ():
            broadcast(buffer)

    def save(self) -> None:
        self.same_on_all()
        self.split.counts()
        state = checkpoint.training_state(self.model, self.optimiser, self.average, **self._progress())
        checkpoint.save(self.checkpoints, self.done, state, keep=1)

    def resume(self) -> None:
        newest = checkpoint.saved(self.checkpoints)[-1:]
        if not newest:
            return
        state = checkpoint.restore(newest[0], self.model, self.optimiser, self.average, **self._progress())["progress"]
        if state["name"] != self.name:
            raise TrainingError(
                f"the checkpoint {newest[0]} was made with another config, encoder or data. Give the command that made it, "
                "or start anew without --resume."
            )
        self.done, self.bad, self.seconds = state["step"], state["bad"], state["seconds"]
        self.split.skipped |= {row: Skip(*said) for row, *said in json.loads(state["skipped"])}


class _Log:
    """Lines of `metrics.jsonl` in a folder, or nothing at all; `seconds` are those of training."""

    def __init__(self, folder: Path | None, run: _Run) -> None:
        self.folder, self.run = folder if world()[0] == 0 else None, run
        self.file: IO[str] | None = None

    def __enter__(self) -> "_Log":
        if self.folder is not None:
            path = self.folder / "metrics.jsonl"
            cut_metrics(path, self.run.done - 1)
            self.file = open(path, "a")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def __call__(self, step: int, **values: Any) -> None:
        if self.file is not None:
            seconds = round(self.run.seconds + time.monotonic() - self.run.begun, 3)
            self.file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            self.file.flush()
