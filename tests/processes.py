"""Running things in processes of their own: two gloo ranks, the command line."""

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Done(NamedTuple):
    """What a command left: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


# gloo's threads may still run when a loaded machine ends the process, which then dies of it: wait for the other, and go.
LEAVE = """
def leave():
    import os, sys
    import torch.distributed as dist
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

"""


# What takes a process its first seconds is imported once, by a server that forks: all tests' processes begin from there.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "timm", "open_clip"])


@dataclass
class Child:
    """A process that runs Python, as `python` would run it, and the files that it writes to."""

    process: Any
    out: Path
    error: Path

    def ended(self, timeout: float) -> Done:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.error.read_text()[-3000:])
        done = Done(self.process.exitcode, self.out.read_text(), self.error.read_text())
        shutil.rmtree(self.out.parent)
        return done

    def killed(self) -> None:
        """Kill it as `kill -9` does."""
        self.process.kill()
        self.ended(60)


def start(*argv: str, cwd: Path | None = None, **env: str) -> Child:
    """`python *argv`, where argv is a script with its arguments, or -m and a module with its own."""
    folder = Path(tempfile.mkdtemp())
    child = Child(None, folder / "out", folder / "error")
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""} | env
    child.process = FORKS.Process(target=_python, args=(argv, cwd or Path.cwd(), env, child.out, child.error))
    child.process.start()
    return child


def _python(argv: tuple[str, ...], cwd: Path, env: dict[str, str], out: Path, error: Path) -> None:
    for path, number in ((out, 1), (error, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    module = argv[0] == "-m"
    sys.argv = list(argv[module:])
    sys.path.insert(0, str(cwd if module else Path(argv[0]).parent))
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def on_two_processes(code: str, *args: str, folder: Path) -> list[str]:
    """Run `code` on two gloo processes; it finds RANK and WORLD_SIZE in the environment. Returns their outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = folder / "two.py"
    script.write_text(code)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = [start(str(script), *args, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    done = [child.ended(120) for child in children]
    for one in done:
        assert one.returncode == 0, one.stderr[-3000:]
    return [one.stdout for one in done]


def run_cutline(*args: str, cwd: Path | None = None, timeout: float = 240) -> Done:
    """Run the command line in a process of its own."""
    return start("-m", "cutline.cli", *args, cwd=cwd).ended(timeout)


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
