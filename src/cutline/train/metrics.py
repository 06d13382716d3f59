"""What a run logs: `metrics.jsonl` and TensorBoard."""

import json
import math
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cutline.record import write_atomic

if TYPE_CHECKING:
    from cutline.train.loop import Run

# Dense bf16 peak, FLOP/s, from the makers' data sheets; MFU is logged for these alone.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


class Metrics:
    """`metrics.jsonl` and TensorBoard: means over `log_every` steps, without numbers that are not finite."""

    def __init__(self, run: "Run") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.values, self.count = run, dict[str, list[float]](), 0
        self.file = open(run.out / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.board = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1)
        self._mark()

    def _mark(self) -> None:
        self.begun, self.waited = time.monotonic(), self.run.stream.waited

    def add(self, log: dict[str, float]) -> None:
        for name, value in log.items():
            if math.isfinite(value):  # a skipped step would take those around it with it
                self.values.setdefault(name, []).append(value)
        self.count += 1
        if self.run.step % self.run.recipe.train.log_every == 0 or self.run.step == self.run.steps:
            self.flush()

    def flush(self) -> None:
        if not self.count:
            return
        run, seconds = self.run, time.monotonic() - self.begun
        batch = run.recipe.train.batch
        row = {name: statistics.fmean(values) for name, values in self.values.items()}
        row |= {
            "images_per_second": self.count * batch / seconds,
            "data_wait": (run.stream.waited - self.waited) / seconds,
            "peak_memory_gib": peak_memory(run.device),
            "skipped_steps": run.bad,
        }
        if run.flops:
            row["tflops"] = run.flops * self.count / seconds / 1e12
            name = torch.cuda.get_device_name(run.device)
            peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
            if peak:
                row["mfu"] = row["tflops"] * 1e12 / peak
        self.file.write(json.dumps({"step": run.step, "samples": run.step * batch, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, run.step)
        self.values, self.count = {}, 0
        self._mark()

    def close(self) -> None:
        self.flush()
        self.file.close()
        self.board.close()


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a killed run wrote past its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # half a line, cut off by a kill
    write_atomic(path, "".join(kept).encode())
