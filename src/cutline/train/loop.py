"""The training loop: stream → model and objectives → optimiser step → metrics and checkpoints.

`train(recipe, out, resume)` is a whole run on this process, or on its share of one that torchrun started. A run
directory holds `recipe.yaml` (resolved), `metrics.jsonl`, TensorBoard events, `checkpoints/` and `model/`.
"""

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cutline import objectives, towers
from cutline.config import dump, load
from cutline.errors import ConfigError, TrainingError
from cutline.objectives import collapse
from cutline.objectives.base import Batch, Features, Objective
from cutline.objectives.gather import barrier, world
from cutline.progress import Tick, progress
from cutline.record import write_atomic
from cutline.towers.patches import set_patch_dropout
from cutline.train import checkpoint, gradcache
from cutline.train.device import device_of, process_group
from cutline.train.metrics import Metrics, cut_metrics
from cutline.train.optim import average_in, averaged, param_groups, schedule, set_lr
from cutline.train.recipe import DataConfig, Recipe
from cutline.train.stream import Cached, Source, Stream, check_columns, open_source
from cutline.train.stream.replay import IMAGE, TEXT


class Trainee(nn.Module):
    """Model and objectives as one module, so that one wrapper (DDP, FSDP, compile) holds all that learns."""

    def __init__(self, model: towers.Model, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        configs = recipe.objective_configs()
        self.objectives = nn.ModuleDict({name: objectives.build(name, c, model) for name, c in configs.items()})
        # In a tuple: not a part of this module. With it the pass of the embedding also gives the dense map.
        self._encoder = (towers.load_encoder(model),) if any(o.reads_map for o in self.methods().values()) else ()

    def methods(self) -> dict[str, Objective]:
        return {name: o for name, o in self.objectives.items() if isinstance(o, Objective)}

    @property
    def encoder(self) -> towers.Encoder | None:
        """For `Features`, where an objective reads dense maps."""
        return self._encoder[0] if self._encoder else None

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss (a scalar) and what to log of it by name."""
        return self.losses(self.methods(), batch, Features(self.model, batch, self.encoder))

    def losses(self, names: Iterable[str], batch: Batch, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of some objectives, from these features."""
        total: Tensor = torch.zeros((), device=next(iter(batch.views.values())).device)
        log: dict[str, Tensor] = {}
        methods = self.methods()
        for name in names:
            objective = methods[name]
            terms = objective(batch, features)
            total = total + objective.config.weight * torch.stack(list(terms.values())).sum()
            log |= {f"{name}/{term}": value.detach() for term, value in (terms | objective.logged).items()}
        seen = features.seen()
        if seen is not None:
            log |= {f"image/{what}": value for what, value in collapse.spread(seen).items()}
        return total, log


@dataclass
class Run:
    """A run in progress on this process."""

    recipe: Recipe
    out: Path
    device: torch.device
    trainee: Trainee
    wrapped: nn.Module
    optimiser: torch.optim.Optimizer
    stream: Stream
    average: AveragedModel | None
    steps: int
    step: int = 0
    bad: int = 0  # steps skipped so far
    bad_in_row: int = 0
    seconds: float = 0.0
    flops: float = 0.0  # of one step on this process
    collapsed: dict[str, int] = field(default_factory=dict)  # steps on end that looked so, by objective

    def __post_init__(self) -> None:
        self.collapsed = dict.fromkeys(["image", *self.trainee.methods()], 0)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside weights and their kin."""
        numbers = {"step": self.step, "bad": self.bad, "bad_in_row": self.bad_in_row, "seconds": self.seconds}
        return {"stream": self.stream.state_dict(), "progress": {**numbers, "collapsed": self.collapsed}}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return checkpoint.training_state(self.trainee, self.optimiser, self.average, **self.progress())

    def final(self) -> towers.Model:
        """The model as it would be kept now: the weights' average, if there is one."""
        return self.trainee.model if self.average is None else cast(towers.Model, self.average.module)

    def resume(self, path: Path) -> None:
        state = checkpoint.restore(path, self.trainee, self.optimiser, self.average, **self.progress())
        self.stream.load_state_dict(state["stream"])
        self.step, self.bad = state["progress"]["step"], state["progress"]["bad"]
        self.bad_in_row, self.seconds = state["progress"]["bad_in_row"], state["progress"]["seconds"]
        self.collapsed = state["progress"]["collapsed"]


class Watch(Protocol):
    """Looks at a run at every checkpoint. kept: the folder of the model to keep, which becomes the run's `model/`."""

    kept: Path

    def __call__(self, run: Run) -> bool:
        """Whether to stop here. May be called twice at one step: before a kill, and after the resume."""


def train(
    recipe: Recipe, out: Path, resume: bool = False, source: Source | None = None, show: bool = True,
    watch: Watch | None = None,
) -> Path:  # fmt: skip
    """Train `recipe` into the run directory `out`; returns `out`.

    resume: go on from the newest checkpoint in `out` (to the bit on one process), or start if there is none. source:
    an open source to read instead of opening `recipe.data.pairs` (for runs in one process that share pictures).
    Raises `ConfigError` if `out` holds a run and `resume` is not set, `DataError` for unreadable data and
    `TrainingError` where training cannot go on.
    """
    with process_group(recipe.train.device):
        run = prepare(recipe, out, resume, source)
        batch, shown = recipe.train.batch, show and world()[0] == 0
        with progress(recipe.name, run.steps * batch, "images", shown, done=run.step * batch) as tick:
            _loop(run, tick, watch)
        if world()[0] == 0:
            if watch is None:
                towers.save(run.final(), out / ".model")
            else:
                shutil.rmtree(out / ".model", ignore_errors=True)
                shutil.copytree(watch.kept, out / ".model")
            shutil.rmtree(out / "model", ignore_errors=True)
            os.replace(out / ".model", out / "model")  # there is a model when, and only when, the run is finished
        barrier()
    return out


def prepare(recipe: Recipe, out: Path, resume: bool, source: Source | None = None) -> Run:
    """Build everything, write `recipe.yaml`, and go to the newest checkpoint if `resume` says so."""
    config = recipe.train
    rank, size = world()
    newest = checkpoint.saved(out / "checkpoints")[-1:] if resume else []
    if not resume and (out / "recipe.yaml").exists():
        raise ConfigError(f"{out} already holds a run. Add --resume to go on with it, or choose another --out.")
    if newest and dump(load(Recipe, out / "recipe.yaml")) != dump(recipe):
        raise ConfigError(
            f"the recipe differs from {out / 'recipe.yaml'}; resume with the same one, or choose another --out."
        )
    device = device_of(config.device)
    torch.manual_seed(recipe.seed)
    model = towers.build(recipe.towers, device=device)
    trainee = Trainee(model, recipe).to(device)
    torch.manual_seed(recipe.seed + 1 + rank)  # what is drawn while training differs between processes
    if recipe.towers.patch_dropout and not any(o.reads_pooled for o in trainee.methods().values()):
        raise ConfigError(
            f"towers.patch_dropout={recipe.towers.patch_dropout} would do nothing: it leaves patches out of the pooled embedding, "
            f"which {', '.join(trainee.methods())} does not read. Set it to 0."
        )
    stream = _stream(recipe, trainee, model, source, device)
    groups = param_groups(trainee, config.lr, config.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    average = None
    if config.ema is not None:
        average = averaged(model, config.ema)
    wrapped: nn.Module = trainee
    if size > 1 and config.micro_batch is not None:
        for tensor in (*trainee.parameters(), *trainee.buffers()):
            dist.broadcast(tensor.detach(), 0)  # as DDP does, which is not there
    if size > 1 and config.micro_batch is None:
        wrapped = nn.parallel.DistributedDataParallel(trainee, find_unused_parameters=True)
    if config.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    steps = math.ceil(recipe.train.samples / config.batch)
    run = Run(recipe, out, device, trainee, wrapped, optimiser, stream, average, steps)
    if newest:
        run.resume(newest[0])
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "recipe.yaml", dump(recipe).encode())
        cut_metrics(out / "metrics.jsonl", run.step)
    return run


def read_from(data: DataConfig) -> Source:
    """The source that a recipe names, kept in memory as it is read if the recipe says so."""
    source = open_source(data.pairs, data.where)
    return Cached(source) if data.cache else source


def _stream(
    recipe: Recipe, trainee: Trainee, model: towers.Model, source: Source | None, device: torch.device
) -> Stream:
    data, (rank, size) = recipe.data, world()
    methods = list(trainee.methods().values())
    if source is None:
        source = read_from(data)
    for name, method in trainee.methods().items():
        for column in method.columns():
            if column not in (IMAGE, TEXT):  # which are made of others
                check_columns(source, [column], f"objectives.{name}", method.made_by(column))
    texts = ", ".join(f"objectives.{name}" for name, o in trainee.methods().items() if o.needs_text)
    for column in recipe.data.text.columns if texts else ():
        made_by = f"Captions are made with: cutline caption write PAIRS --with CAPTIONER --as {column}"
        check_columns(source, [column], texts, made_by)
    encoder = towers.load_encoder(model)  # for what it says of the pictures
    shape = model.visual.preprocess_cfg["size"]  # type: ignore[index]
    if not isinstance(shape, int) and len(set(shape)) > 1:
        raise ConfigError(
            f"towers: the image tower takes pictures of {'×'.join(map(str, shape))}, and views of pictures are square: give "
            "image_size one number."
        )
    return Stream(
        source,
        batch=recipe.train.batch,
        size=encoder.size,
        mean=encoder.mean,
        std=encoder.std,
        seed=recipe.seed,
        augment=data.augment,
        text=data.text if texts else None,
        tokenizer=towers.Tokenizer(model) if texts else None,
        views={name: view for o in methods for name, view in o.views().items()},
        columns=sorted({c for o in methods for c in o.columns()}),
        maps=[m for o in methods for m in o.maps()],
        replay=data.replay,
        threads=data.threads,
        block=data.block,
        max_bad=data.max_bad,
        rank=rank,
        world=size,
        pin=device.type == "cuda",
    )


def _loop(run: Run, tick: Tick, watch: Watch | None = None) -> None:
    config = run.recipe.train
    batches = run.stream.batches(until=run.steps)
    begun, seconds = time.monotonic(), run.seconds
    warned: set[str] = set()
    with closing(Metrics(run)) if world()[0] == 0 else nullcontext() as writer:
        stopped = watch is not None and run.step > 0 and watch(run)  # the kill came after the last look
        for batch in () if stopped else batches:
            log = train_step(run, batch.to(run.device))
            run.step += 1
            run.seconds = seconds + time.monotonic() - begun
            if writer is not None:
                writer.add(log)
            tick(config.batch, f"loss {log['loss']:.3f}")
            warned = _warn(run, warned, log, tick)
            if run.step % config.save_every == 0 or run.step == run.steps:
                if writer is not None:
                    writer.flush()
                checkpoint.save(run.out / "checkpoints", run.step, run.state(), config.keep)
                if watch is not None and watch(run):
                    break


def _warn(run: Run, before: set[str], log: dict[str, float], tick: Tick) -> set[str]:
    """Show what objectives want to tell, once, and what has been collapsed for long; returns the names of those that warn."""
    methods = run.trainee.methods()
    warnings = {name: o.warning for name, o in methods.items() if o.warning}
    for name in warnings.keys() - before:
        tick.say(f"step {run.step}: {warnings[name]}")
    for name, told in ({"image": collapse.of_pictures(log)} | {n: o.collapse for n, o in methods.items()}).items():
        run.collapsed[name] = run.collapsed[name] + 1 if told else 0
        if run.collapsed[name] == collapse.PATIENCE:
            tick.say(f"step {run.step}, and for {collapse.PATIENCE} steps on end: {told}")
    return set(warnings)


def train_step(run: Run, batch: Batch) -> dict[str, float]:
    """One optimiser step; a loss or gradient that is not finite leaves the weights as they are and is counted."""
    config, see = run.recipe.train, run.recipe.towers
    if see.patch_dropout:
        tail = run.step >= run.steps * (1 - see.unmasked_tail)
        set_patch_dropout(run.trainee.model.visual, 0.0 if tail else see.patch_dropout)
    peak = config.lr * schedule(run.step, run.steps, config.warmup, config.schedule, floor=config.floor)
    set_lr(run.optimiser, peak)
    half = config.precision == "bf16" or (config.precision == "auto" and _has_bf16(run.device))
    statistics = [b.clone() for b in run.trainee.buffers()]  # of batch norms, which the forward pass moves
    precision = partial(torch.autocast, run.device.type, torch.bfloat16, enabled=half)
    with _counted(run):
        if config.micro_batch is None:
            with precision():
                loss, terms = run.wrapped(batch)
            loss.backward()
        else:
            loss, terms = gradcache.backward(run.trainee, batch, config.micro_batch, precision)
    norm = torch.nn.utils.clip_grad_norm_(run.trainee.parameters(), config.clip or float("inf"))
    numbers = torch.stack([loss.detach().float(), norm.float(), *(t.float() for t in terms.values())])
    if world()[1] > 1:
        dist.all_reduce(numbers)
        numbers /= world()[1]
    values = numbers.tolist()
    if math.isfinite(values[0]) and math.isfinite(values[1]):
        run.optimiser.step()
        run.bad_in_row = 0
        _clamp_scale(run.trainee.model, config.max_logit_scale)
        for objective in run.trainee.methods().values():
            objective.after_step(run.trainee.model, run.step)
        if run.average is not None:
            average_in(run.average, run.trainee.model)
    else:
        for buffer, before in zip(run.trainee.buffers(), statistics, strict=True):
            buffer.copy_(before)
        for objective in run.trainee.methods().values():
            objective.after_skip()
        _count_bad(run, values, batch)
    run.optimiser.zero_grad(set_to_none=True)
    scale = getattr(run.trainee.model, "logit_scale", None)
    log = {"loss": values[0], "grad_norm": values[1], "lr": peak} | dict(zip(terms, values[2:], strict=True))
    if scale is not None:
        log["logit_scale"] = float(scale.detach().exp())
    return log


def _count_bad(run: Run, values: list[float], batch: Batch) -> None:
    run.bad += 1
    run.bad_in_row += 1
    if run.bad_in_row >= run.recipe.train.bad_steps:
        keys = ", ".join(batch.keys[:8]) + (", …" if len(batch.keys) > 8 else "")
        raise TrainingError(
            f"the loss or its gradient was not finite {run.bad_in_row} steps in a row, last at step {run.step} (loss "
            f"{values[0]}, gradient norm {values[1]}; samples {keys}). The weights are those of the last good step. "
            "Lower train.lr, lengthen train.warmup, or look at these samples."
        )


def _clamp_scale(model: nn.Module, most: float) -> None:
    scale = getattr(model, "logit_scale", None)
    if scale is not None:
        with torch.no_grad():
            scale.clamp_(0, math.log(most))


@contextmanager
def _counted(run: Run) -> Iterator[None]:
    """Count the FLOPs of the first step on a GPU, for MFU (with micro-batches these include both passes)."""
    if run.flops or run.device.type != "cuda" or run.recipe.train.compile:
        yield
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield
    run.flops = counter.get_total_flops()


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
