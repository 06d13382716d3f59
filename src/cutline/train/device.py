"""Which device a config means; the same rule for pretraining, transfer and zero-shot."""

import os

import torch

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
