"""Running things in processes of their own: two gloo ranks, the command line."""

import os
import socket
import subprocess
import sys
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
