"""The engine on a Ray cluster: batches go out through Ray Data to actors that have loaded the work, records come back.

Every actor opens the table itself, at the version of the driver, so the table and the pictures must lie where all
machines see them; only the driver writes. The cluster is that of RAY_ADDRESS, or one that is started on this machine. An
actor that dies is started again by Ray and its batches are made again.

Left out on purpose: `lance_ray.add_columns` commits once for the whole table and keeps nothing on the way, so that a
kill would lose everything.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa

from cutline.captions.steps import Batch, Packed, work_through
from cutline.captions.work import Work, Worker
from cutline.errors import ConfigError, CutlineError, DataError
from cutline.pairs import Pairs
from cutline.pairs.columns import ColumnJob

T = TypeVar("T")
# `Packed`, and what to tell the user instead.
SCHEMA = pa.schema(
    [("piece", pa.int64()), ("record", pa.large_binary()), ("rows", pa.int64()), ("failed", pa.list_(pa.string())),
     ("tokens", pa.int64()), ("error", pa.string())]
)  # fmt: skip
TASK = 8  # batches an actor is given at a time: few enough to lose little, enough to hide the way there and back


def on_ray(
    job: ColumnJob, work: Work, batches: Iterator[Batch], workers: int | None, gpus: float | None, task: int = TASK
) -> Iterator[Packed]:
    """Make `batches` on a Ray cluster; what comes is in no order. Raises `ConfigError` without Ray or its GPUs."""
    ray, started = _start(log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # the engine shows its own
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as well
        gpus, workers, beside = _share(ray.cluster_resources(), gpus, workers)
        # As Arrow at once: the row numbers of a whole table, as Python's, would fill the memory.
        blocks = [
            pa.Table.from_pylist(block) for block in iter(lambda: [b._asdict() for b in islice(batches, task)], [])
        ]
        if not blocks:
            return
        table = (job.pairs.path, job.pairs.filter, job.pairs.version)
        data = ray.data.from_arrow(blocks).map_batches(
            _Actor, batch_size=None, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))), num_gpus=gpus or None,
            num_cpus=1, fn_constructor_args=(os.getcwd(), *table, job.name, job.reads, work, beside),
        )  # fmt: skip
        for row in data.iter_rows():
            error = row.pop("error")
            if error:
                raise DataError(error)
            yield Packed(**row)
    except ray.exceptions.RayError as e:
        last = str(e).strip().splitlines()[-1]
        raise CutlineError(f"Ray stopped: {last} What was made is kept; run the same command again.") from e
    finally:
        if started:
            ray.shutdown()


def _share(resources: dict[str, float], gpus: float | None, workers: int | None) -> tuple[float, int, int]:
    """GPUs of each worker, the number of workers, and how many of them share a machine."""
    have = resources.get("GPU", 0.0)
    gpus = (1.0 if have else 0.0) if gpus is None else gpus
    if gpus > have:
        raise ConfigError(f"a worker is to hold {gpus:g} GPUs and the Ray cluster has {have:g}: lower --gpus.")
    nodes = max(1, sum(name.startswith("node:") and "internal" not in name for name in resources))
    workers = workers or (int(have / gpus) if gpus else nodes)
    return gpus, workers, -(-workers // nodes)


class _Actor:
    """A worker on the cluster: loads the work once, then makes batches."""

    def __init__(
        self,
        folder: str,
        path: str,
        where: str | None,
        version: int,
        name: str,
        reads: list[str],
        work: Work,
        beside: int,
    ) -> None:
        import torch

        _go_to(folder)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))  # Ray would give it one
        pairs = Pairs.open(path, where, version)
        self.job = ColumnJob(pairs, name, dict(work.writes), work.provenance(), reads)
        self.worker: Worker | None = None
        self.load = work.load

    def __call__(self, batches: pa.Table) -> pa.Table:
        """A user's error comes back as a row, since Ray wraps what is raised past recognition."""
        made: list[dict[str, Any]] = []
        try:
            self.worker = self.worker or self.load()
            todo = [Batch(**row) for row in batches.to_pylist()]
            for packed in work_through(self.job, self.worker, todo):
                made.append(packed._asdict() | {"error": ""})
        except CutlineError as e:  # what was made before is kept
            made.append(Packed(0, b"", 0, [], 0)._asdict() | {"error": str(e)})
        return pa.Table.from_pylist(made, SCHEMA)


def call_on_ray(function: Callable[..., T], *args: Any) -> T:
    """Call a function on one machine of the cluster, with a GPU if there is one; what it prints is shown here."""
    ray, started = _start()
    try:
        gpu = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        result: T = ray.get(ray.remote(num_gpus=gpu, max_retries=0)(_there).remote(os.getcwd(), function, *args))
        return result
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None)
        raise (cause if isinstance(cause, CutlineError) else CutlineError(f"Ray stopped: {e}")) from e
    finally:
        if started:
            ray.shutdown()


def _there(folder: str, function: Callable[..., T], *args: Any) -> T:
    _go_to(folder)
    return function(*args)


def _go_to(folder: str) -> None:
    """Relative paths mean here what they mean where the command was given, if the machines share that folder."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def _start(**options: Any) -> tuple[Any, bool]:
    """Ray, and whether it was started or joined just now. Raises `ConfigError` where there is none."""
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise ConfigError("--on ray needs Ray: pip install 'cutline[ray]'.") from e
    if ray.is_initialized():
        return ray, False
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(include_dashboard=False, configure_logging=False, **options)
    except (OSError, ConnectionError, RuntimeError) as e:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address!r} ({e}). Start it (ray start --head), or unset RAY_ADDRESS "
            "to start one on this machine." if address else f"Ray does not start: {e}"
        ) from e  # fmt: skip
    return ray, True
