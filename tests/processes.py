"""Running things in processes of their own: two gloo ranks, the command line."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# gloo's threads may still run when a loaded machine ends the process, which then dies of it: wait for the other, and go.
LEAVE = """
def leave():
    import os, sys
    import torch.distributed as dist
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

"""


def on_two_processes(code: str, *args: str, folder: Path) -> list[str]:
    """Run `code` on two gloo processes; it finds RANK and WORLD_SIZE in the environment. Returns their outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = folder / "two.py"
    script.write_text(code)
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                        "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, str(script), *args], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]  # fmt: skip
    done = [child.communicate(timeout=120) for child in children]
    for child, (_, error) in zip(children, done, strict=True):
        assert child.returncode == 0, error[-3000:]
    return [out for out, _ in done]


def run_cutline(*args: str, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cutline.cli", *args], capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def kill_until_done(code: str, *args: str, longest: float, kills: int, seed: int, done: Callable[[], bool]) -> int:
    """Start `code` and kill it after a random time, up to `kills` times, then let it end.

    done: whether the work was whole when the kill came. Returns the kills that hit.
    """
    rng, hits = random.Random(seed), 0
    for turn in range(kills + 1):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert child.stdout.readline() == "go\n", child.stderr.read()
        if turn < kills:
            time.sleep(rng.uniform(0, longest))
            child.send_signal(signal.SIGKILL)
        _, error = child.communicate(timeout=60)
        hits += child.returncode == -signal.SIGKILL
        if child.returncode == 0 or done():
            return hits
        assert child.returncode == -signal.SIGKILL, error
    raise AssertionError("it never came to its end")
