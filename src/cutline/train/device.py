"""Which device a config means, and the processes of torchrun; the same rules for pretraining, transfer and zero-shot."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cutline.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device of that name, this process's own under torchrun; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"device={name!r} is not a device: use auto, cpu, cuda or cuda:1.") from e
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"device={name!r} is not there: {str(e).splitlines()[0]} Use auto or cpu.") from e
    return device


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; NCCL on GPUs, gloo elsewhere."""
    gpu = torch.cuda.is_available() and device != "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield
        return
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()
