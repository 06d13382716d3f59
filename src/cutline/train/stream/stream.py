"""Batches for training, as a pure function of (seed, epoch, position).

Threads (not processes: decoding and resizing release the interpreter lock) read rows and take chunks of a batch: decode,
augment into the batch's array, tokenise. A few batches are made ahead and handed out in order. What a batch holds
depends on the order, the seed and the data alone, not on the number of threads or what was trained before, so a state
is a few integers.

With `replay` the view "image" is one of the augmentations that `cutline reinforce` has stored, and the teachers'
embeddings of what was drawn come with it (see `replay.py`).

A picture that cannot be read is replaced by another row, again a pure function, and counted by reason. When clearly
more than `max_bad` of the pictures are broken, the stream stops with a message.
"""

import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Batch, Map, Texts, View
from cutline.pairs.decode import BadPicture
from cutline.train.stream.maps import LabelMaps
from cutline.train.stream.order import Order, draws
from cutline.train.stream.pictures import RowPicture, replay_view
from cutline.train.stream.replay import DRAWN, IMAGE, TEACHERS, TEXT, Replay, Unusable
from cutline.train.stream.source import Source, check_columns, fingerprint_of
from cutline.train.stream.text import TextConfig, Tokenizer
from cutline.train.stream.transforms import Augment, Augmentation, Normalize

Channels = tuple[float, float, float]
Floats = NDArray[np.float32]
Row = dict[str, Any]
T = TypeVar("T")
ATTEMPTS = 32  # replacements tried for one broken picture
JUDGED = 100  # pictures seen before the share of broken ones is judged
EXAMPLES = 5  # keys kept for each reason


@dataclass
class _Part:
    """What a chunk of a batch gives beside its pictures."""

    keys: list[str] = field(default_factory=list)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (reason, key)
    truncated: int = 0  # texts


class Stream:
    """Iterate over `Batch`es from where the state stands, for ever (or see `batches`).

    batch: samples a step over all `world` processes; this one, `rank`, gets its equal share. block: see `Order`. size,
    mean, std: of the tower; augment: of the view "image"; views: further ones, with a crop scale of their own and
    without RandAugment. text, tokenizer: None for objectives without text. columns: table columns to collate into
    `Batch.columns`; maps: columns of label maps, which follow the view "image" (see `maps.py`). replay: the prefix of stored augmentations, of which the view "image" is then one; the teachers'
    vectors come where `columns` asks for them (`replay.IMAGE`, `replay.TEXT`). threads: 0 does all in the caller, None
    takes one per core (of this process's share). max_bad: share of broken pictures at which to stop. pin: page-locked
    memory, for copies to a GPU beside its work.

    counts: pictures and texts given out, broken pictures (by reason, too), empty and truncated texts; examples: keys by
    reason; waited: seconds that the caller has waited for data. Raises `ConfigError` for an unknown column or a batch
    that is larger than the data.
    """

    def __init__(
        self, source: Source, *, batch: int, size: int, mean: Channels, std: Channels, seed: int = 0,
        augment: Augment | None = None, text: TextConfig | None = None, tokenizer: Tokenizer | None = None,
        views: Mapping[str, View] | None = None, columns: Sequence[str] = (), maps: Sequence[Map] = (),
        replay: str | None = None, threads: int | None = None, block: int | None = None, max_bad: float = 0.01,
        rank: int = 0, world: int = 1, pin: bool = False,
    ) -> None:  # fmt: skip
        assert (text is None) == (tokenizer is None)
        self.source, self.text, self.tokenizer = source, text, tokenizer
        self.order = Order(len(source), batch, seed, world, rank, block)
        self.max_bad = max_bad
        self.threads = _cores() if threads is None else threads
        augment = augment or Augment()
        self.views: dict[str, tuple[Augment, int, int]] = {"image": (augment, size, 1)}  # augmentation, pixels, count
        for name, view in (views or {}).items():
            own = augment.model_copy(update={"scale": view.scale, "operations": 0})
            self.views[name] = (own, view.size or size, view.count)
        asked = [c for c in columns if c in (IMAGE, TEXT)]
        self.columns = [c for c in columns if c not in asked]
        texts = list(text.columns) if text else []
        check_columns(source, [*texts, *self.columns])
        if asked and replay is None:
            raise ConfigError(
                "objectives.distill asks for the embeddings of teachers, and the recipe says not where they are stored. Set "
                "data.replay to the prefix that was given to `cutline reinforce … --as PREFIX`, or name an online teacher "
                "(objectives.distill.teacher)."
            )
        self.replay = None if replay is None else Replay(source, replay, text, asked)
        self.maps = LabelMaps(source, maps, augment, replay is not None)
        more = [*(self.replay.columns if self.replay else []), *self.maps.columns]
        self.read_columns = list(dict.fromkeys(["key", "image", *texts, *self.columns, *more]))
        self.normalize = Normalize(mean, std)
        self._buffers = _Buffers(pin)
        self.step = 0
        self.waited = 0.0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the next step, and what the order was made from."""
        o = self.order
        return {
            "step": self.step, "seed": o.seed, "n": o.n, "batch": o.batch, "block": o.block,
            "window": o.window, "fingerprint": fingerprint_of(self.source, self.read_columns),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; raises `ConfigError` if the data or the order are not the same."""
        mine = self.state_dict()
        differ = [k for k in mine if k != "step" and mine[k] != state.get(k)]
        if differ:
            what = "; ".join(f"{k}: {state.get(k)!r} then, {mine[k]!r} now" for k in differ)
            raise ConfigError(
                f"cannot resume in the middle of another order of samples ({what}). Resume with the data, seed and "
                "batch of the first start, or begin a new run."
            )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, until: int | None = None) -> Iterator[Batch]:
        """Batches from the present step up to (not with) step `until`; `self.step` is the next one when one is out."""
        # One core each, so that the model keeps its own.
        pool = ThreadPoolExecutor(self.threads, "stream", torch.set_num_threads, (1,)) if self.threads else None
        # Enough batches ahead that every thread has work while the caller holds one and waits for the next.
        ahead = 2 + self.threads * self._chunk // self.order.share
        coming: deque[_Coming] = deque()
        begun = self.step
        try:
            while until is None or self.step < until:
                while len(coming) < ahead and (until is None or begun < until):
                    coming.append(_Coming(self, begun, pool))
                    begun += 1
                start = time.perf_counter()
                parts = coming[0].parts()
                batch = self._collate(coming.popleft(), parts)
                self._judge()
                self.step += 1
                self.waited += time.perf_counter() - start
                yield batch
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _chunk(self) -> int:
        """Samples of one task: a batch is shared among threads, but reading few rows at once is slow."""
        return min(256, max(32, -(-self.order.share // max(self.threads, 1))))

    def _make(self, step: int, start: int, rows: list[int], read: list[Row], out: Mapping[str, Floats]) -> _Part:
        """Fill places start… of the views from `rows` as they were read, and return the rest of them."""
        part = _Part()
        epoch = self.order.epoch(step)
        for at, (row, values) in enumerate(zip(rows, read, strict=True), start):
            broken = row
            for attempt in range(ATTEMPTS + 1):
                try:
                    drawn, how = self._picture(row, epoch, values, at, out)
                    self._words(row, epoch, values, drawn, how, part)
                    break
                except (BadPicture, Unusable) as e:
                    detail = e.detail if isinstance(e, Unusable) else ""
                    part.broken.append((e.reason, str(values["key"]) + (f": {detail}" if detail else "")))
                if attempt < ATTEMPTS:
                    row = self._replacement(step, epoch, broken, attempt)
                    values = self._read([row])[0]
            else:
                raise self._too_many(part.broken)
        if self.text is not None and self.tokenizer is not None:
            for source, lists in part.texts.items():
                flat = [t for texts in lists for t in texts]
                part.tokens[source] = self.tokenizer(flat)
                part.truncated += self.tokenizer.truncated(flat, part.tokens[source])
        return part

    def _read(self, rows: list[int]) -> list[Row]:
        return self.source.read(rows, self.read_columns)

    def _picture(
        self, row: int, epoch: int, values: Row, at: int, out: Mapping[str, Floats]
    ) -> tuple[int, Augmentation]:
        """Write all views of a row; returns which of its stored augmentations was drawn (−1 without `replay`), and what
        was done to the view "image".

        Raises `BadPicture` or `Unusable`.
        """
        if values["image"] is None:
            raise Unusable("unreadable", str(values.get("error", "")))
        picture, seed, drawn = RowPicture(values["image"]), self.order.seed, -1
        views, done = self.views, dict[str, Augmentation]()
        if self.replay is not None:
            drawn, done["image"] = self.replay.draw(values, picture.size, draws(seed, epoch, row, "replay"))
            size = views["image"][1]
            self.normalize(replay_view(picture, self.replay.augment, done["image"], size), out["image"][at])
            views = {name: view for name, view in views.items() if name != "image"}
        plan = [
            (name, at * count + copy, augment, augment.draw(*picture.size, draw), size)
            for name, (augment, size, count) in views.items()
            for draw in [draws(seed, epoch, row, name)]
            for copy in range(count)
        ]
        if plan:
            pixels = picture.pixels((how, size) for *_, how, size in plan)
            for name, place, augment, how, size in plan:
                self.normalize(augment.apply(pixels, how, size), out[name][place])
                done[name] = how
        return drawn, done["image"]

    def _words(self, row: int, epoch: int, values: Row, drawn: int, how: Augmentation, part: _Part) -> None:
        """Put the rest of a row into `part`, or raise `Unusable` and leave `part` as it is."""
        columns = {c: [values[c]] for c in self.columns} | {c: [m] for c, m in self.maps.of(values, how).items()}
        picks = self.text.pick(values, draws(self.order.seed, epoch, row, "text")) if self.text else {}
        if self.replay is not None:
            columns[DRAWN] = [drawn]
            if self.replay.image:
                columns[IMAGE] = [self.replay.image_vector(values, drawn)]
            if self.replay.text_columns:
                columns |= {f"{TEXT}/{source}": self.replay.text_vectors(values, p) for source, p in picks.items()}
        part.keys.append(str(values["key"]))
        for column, found in columns.items():
            part.columns.setdefault(column, []).extend(found)
        for source, chosen in picks.items():
            part.texts.setdefault(source, []).append([p.text for p in chosen])

    def _replacement(self, step: int, epoch: int, row: int, attempt: int) -> int:
        """The row tried for a broken one: pseudo-random, and not one that the step has already, if there are others."""
        draw = draws(self.order.seed, epoch, row, f"replacement {attempt}")
        taken = set(self.order.all_rows(step).tolist())
        tried = [int(draw() * self.order.n) for _ in range(ATTEMPTS)]
        return next((r for r in tried if r not in taken), tried[0])

    def _collate(self, coming: "_Coming", parts: list[_Part]) -> Batch:
        texts: dict[str, Texts] = {}
        for source, weight in self.text.weights.items() if self.text else []:
            assert self.tokenizer is not None
            assert self.text is not None
            lists = [t for p in parts for t in p.texts[source]]
            tokens = self.tokenizer.trimmed(torch.cat([p.tokens[source] for p in parts]))
            owners = torch.repeat_interleave(torch.tensor([len(t) for t in lists]))
            paired = self.text.rule != "all"
            texts[source] = Texts(self._pinned(tokens), self._pinned(owners), paired, weight)
        self._count(parts)
        columns = {c: collate([v for p in parts for v in p.columns[c]]) for c in parts[0].columns}
        if self.replay is not None and self.replay.teachers:
            columns |= {c: self._pinned(v) for c, v in columns.items() if c == IMAGE or c.startswith(f"{TEXT}/")}
            columns[TEACHERS] = self.replay.teachers
        return Batch(coming.views, texts, columns, [k for p in parts for k in p.keys])

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._buffers.pin else tensor

    def _count(self, parts: list[_Part]) -> None:
        self.counts["pictures"] += self.order.share
        for part in parts:
            given = [t for lists in part.texts.values() for texts in lists for t in texts]
            self.counts.update({"texts": len(given), "empty texts": given.count(""), "truncated texts": part.truncated})
            for reason, name in part.broken:
                self.counts.update(["broken", reason])
                known = self.examples.setdefault(reason, [])
                if len(known) < EXAMPLES and name not in known:
                    known.append(name)

    def _judge(self) -> None:
        """Stop if the share of broken pictures is above `max_bad` by more than chance (three standard deviations)."""
        seen, bad = self.counts["pictures"], self.counts["broken"]
        allowed = self.max_bad * seen
        if seen >= JUDGED and bad > allowed + 3 * sqrt(allowed):
            raise self._too_many([])

    def _too_many(self, more: Sequence[tuple[str, str]]) -> DataError:
        examples = {r: list(names) for r, names in self.examples.items()}
        for reason, name in more:
            examples.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{r} ({', '.join(names[:EXAMPLES])})" for r, names in examples.items())
        bad, seen = self.counts["broken"] + len(more), self.counts["pictures"] + len(more)
        return DataError(
            f"{bad:,} of {seen:,} pictures could not be used, more than max_bad={self.max_bad:g}: {reasons}. "
            "`cutline pairs check` lists all of them; mend or filter the data (where), or raise max_bad."
        )


class _Buffers:
    """Float32 tensors to fill, taken again when nobody holds them any more.

    First touching fresh memory costs as much as resizing into it, since the system clears it page by page.
    """

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self._free: dict[tuple[int, ...], list[Floats]] = {}

    def get(self, shape: tuple[int, ...]) -> Tensor:
        if self.pin:
            return torch.empty(shape, pin_memory=True)  # torch keeps these itself, until a copy from them is done
        free = self._free.setdefault(shape, [])
        array = free.pop() if free else np.empty(shape, np.float32)
        lease = array[:]  # lives as long as any tensor that shares its memory
        weakref.finalize(lease, free.append, array).atexit = False
        return torch.from_numpy(lease)


class _Coming:
    """A batch in the making: tasks that read rows, and then hand out tasks that make samples of them."""

    def __init__(self, stream: Stream, step: int, pool: ThreadPoolExecutor | None) -> None:
        self.stream, self.step, self.pool = stream, step, pool
        rows = stream.order.rows(step).tolist()
        self.views = {
            name: stream._buffers.get((len(rows) * count, 3, pixels, pixels))
            for name, (_, pixels, count) in stream.views.items()
        }
        # Near rows read together become few requests, which is what the block shuffle is for.
        size = stream._chunk if stream.order.block is None else len(rows)
        self._reads = [self._start(partial(self._read, i, rows[i : i + size])) for i in range(0, len(rows), size)]

    def parts(self) -> list[_Part]:
        """What the tasks give; waits for them. Call it once: it lets go of the tasks, which hold the batch's memory."""
        reads, self._reads = self._reads, []
        return [made() for read in reads for made in read()]

    def _read(self, start: int, rows: list[int]) -> list[Callable[[], _Part]]:
        read, size = self.stream._read(rows), self.stream._chunk
        out = {name: view.numpy() for name, view in self.views.items()}
        make = partial(self.stream._make, self.step)
        return [
            self._start(partial(make, start + i, rows[i : i + size], read[i : i + size], out))
            for i in range(0, len(rows), size)
        ]

    def _start(self, task: Callable[[], T]) -> Callable[[], T]:
        return self.pool.submit(task).result if self.pool else task


def _cores() -> int:
    """Cores of this process: those it may run on, shared with the other processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def collate(values: list[Any]) -> Any:
    """Numbers and equally shaped arrays → one tensor (B, …); anything else stays a list."""
    if all(isinstance(v, (bool, int, float, np.number)) for v in values):
        return torch.tensor(values)
    arrays = [np.asarray(v) if isinstance(v, (list, np.ndarray)) else None for v in values]
    first = arrays[0]
    if first is None or first.dtype.kind not in "biuf":
        return values
    if any(a is None or a.shape != first.shape or a.dtype.kind not in "biuf" for a in arrays):
        return values
    return torch.from_numpy(np.stack([a for a in arrays if a is not None]))
