"""Where a model runs and weights are rounded: `--device auto|cpu|cuda|cuda:1`, decided before anything else is done.

What goes to a GPU comes back: detection decides on the CPU, from tensors on the CPU, and so does whoever writes. Of
processes that train together (`swquant.parallel`) each takes the GPU of its own number.
"""

from __future__ import annotations

import re

import torch

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.models.memory import available_memory, bytes_as
from swquant.parallel import local_rank, world
from swquant.units import human_bytes

__all__ = ["device_for", "free_memory", "named", "place_for"]

_FORM = re.compile(r"auto|cpu|cuda(:\d+)?")


def device_for(name: str) -> torch.device:
    """The device that a user asked for; of `auto` the first GPU, where there is one, or this process's own. Raises
    SwquantError for what is no device, and for a GPU that is not there."""
    if not _FORM.fullmatch(name):
        raise SwquantError(f"device {name!r} is not one of: auto, cpu, cuda, cuda:1 (or another number)")
    if name == "cpu":
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not count:
        return CPU
    if not count:
        reason = "sees no GPU" if torch.version.cuda else "is a build without CUDA"
        raise SwquantError(
            f"--device {name}: PyTorch {torch.__version__} {reason}; take --device cpu, or install PyTorch for CUDA "
            "(swquant doctor shows what is there)"
        )
    asked = name.partition(":")[2]
    last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0 alone"
    if asked and world().size > 1:
        raise SwquantError(f"--device {name}: one GPU for {world().size} processes; --device cuda gives each its own")
    index = int(asked or local_rank())
    if index >= count and not asked:
        raise SwquantError(
            f"there is no GPU for process {index} of this machine, but {last}; start one process for each GPU, or take "
            "--device cpu"
        )
    if index >= count:
        raise SwquantError(f"--device {name}: there is no such GPU, but {last}")
    return torch.device("cuda", index)


def named(device: torch.device) -> str:
    """For a line of progress: "" on the CPU, " on cuda:0 (NVIDIA H200)" elsewhere."""
    return "" if device.type == "cpu" else f" on {device} ({torch.cuda.get_device_name(device)})"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    return available_memory() if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def place_for(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, copies: int = 1
) -> tuple[torch.device, str]:
    """Where a model can run that is to run on `device`, and what to say of it. A GPU without room for so many copies
    of its weights and a fifth of one more, for what runs through them, leaves it to the CPU, which may read it layer by
    layer; tensors, rounded one at a time, go to the GPU all the same."""
    if device.type == "cpu":
        return device, ""
    needed, free = bytes_as(checkpoint, dtype) * (5 * copies + 1) // 5, free_memory(device)
    if needed <= free:
        return device, named(device)
    return CPU, f" on the CPU: it takes {human_bytes(needed)}, {device} has {human_bytes(free)} free"
