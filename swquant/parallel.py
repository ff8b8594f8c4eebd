"""Several processes that do one training together: what `torchrun` and `accelerate launch` start.

    torchrun --nproc-per-node 2 -m swquant tune small small-tuned --against model

Every process holds the whole model and goes through the whole program, in step with the others. Of each batch it works
on its `share`, and gradients, losses and scores are summed over all before anything is decided by them, so all decide
alike. What one process alone must do, writing above all, the first does, and the others are told (`same`).

The engine is torch.distributed, over gloo for what lies on the CPU and NCCL for what lies on GPUs. `world()` asks it
who we are; in a program that was started alone the world has one process, and all of this does nothing. Nothing is
pickled: what is told is JSON or the bytes of tensors.

A process that fails simply ends. The others notice when they next wait for it (`ProcessGoneError`), and end as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from exporters.errors import SwquantError, first_line

__all__ = ["ProcessGoneError", "World", "join", "launched", "leave", "local_rank", "meeting", "world"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says to each process
# The first process may write text for hours while the others wait. Whoever ends is noticed at once.
_PATIENCE = timedelta(hours=24)
_MEETING = timedelta(minutes=5)


class ProcessGoneError(SwquantError):
    """Another process of this run is not there any more."""


@dataclass(frozen=True)
class World:
    """This process among those that train together. rank: which, from 0; size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of so many things are this process's: all processes have about the same number, in order."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, which give as many, of the same shapes, in one order."""
        if self.size == 1:
            return
        held = [(tensor, tensor.contiguous()) for tensor in tensors]
        with _reached():
            for work in [dist.all_reduce(flat, async_op=True) for _, flat in held]:
                work.wait()
        for tensor, flat in held:
            if flat is not tensor:
                tensor.copy_(flat)

    def totals(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes, bit for bit the same in each."""
        summed = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([summed])
        return [float(number) for number in summed]

    def same(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, which alone calls it: something that JSON holds."""
        if self.size == 1:
            return make()
        return json.loads(self._told(lambda: json.dumps(make()).encode()))

    def same_tensors(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same for tensors on the CPU."""
        if self.size == 1:
            return dict(make())
        made: dict[str, Tensor] = {}

        def forms() -> list[tuple[str, str, list[int]]]:
            made.update({name: tensor.cpu().contiguous() for name, tensor in make().items()})
            return [(name, str(item.dtype).removeprefix("torch."), list(item.shape)) for name, item in made.items()]

        for name, dtype, shape in self.same(forms):
            tensor = made.setdefault(name, torch.empty(shape, dtype=getattr(torch, dtype)))
            if tensor.numel():
                self._broadcast(tensor.view(-1).view(torch.uint8))
        return made

    @contextmanager
    def inside(self, folder: AbstractContextManager[Path]) -> Iterator[Path]:
        """A folder that the first process makes, and puts into its place when all have left the block."""
        with ExitStack() as stack:
            yield Path(self.same(lambda: str(stack.enter_context(folder))))
            self.same(stack.close)

    def _told(self, make: Callable[[], bytes]) -> bytes:
        content = b""
        if self.first:
            try:
                content = make()
            except BaseException:
                with suppress(ProcessGoneError):
                    self._broadcast(torch.tensor([-1]))
                raise
        length = torch.tensor([len(content)])
        self._broadcast(length)
        if int(length) < 0:
            raise ProcessGoneError("the first process of this run has failed")
        told = torch.frombuffer(bytearray(content or bytes(int(length))), dtype=torch.uint8)
        self._broadcast(told)
        return told.numpy().tobytes()

    def _broadcast(self, tensor: Tensor) -> None:
        with _reached():
            dist.broadcast(tensor, src=0)


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessGoneError(f"another process of this run has ended ({first_line(error)})") from None


def world() -> World:
    """This process among those that train together; alone, unless `join` was called, or whoever calls us set
    torch.distributed up."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def launched() -> bool:
    """Whether something like torchrun started this process with others."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] not in ("", "0", "1")


def local_rank() -> int:
    """Which process of this machine it is, and so which of its GPUs it takes."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world().size > 1 else 0


@cache
def meeting() -> tuple[Store, World]:
    """Where the processes that were started together can leave each other notes, and which of them this is. Raises
    SwquantError where they do not find each other."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=_MEETING)))
    except (RuntimeError, ValueError) as error:
        raise SwquantError(
            f"the processes of this run do not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({first_line(error)}); start all of them with one torchrun, or with the same --rdzv-endpoint"
        ) from None
    return store, World(rank, size)


def join(batch: int) -> World:
    """Become one of the processes that train together, if this one was started with others. batch: sequences of a
    step, of all processes together. Raises SwquantError where there are more processes than that."""
    if launched() and not dist.is_initialized():
        store, ours = meeting()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=ours.rank, world_size=ours.size, timeout=_PATIENCE)
    found = world()
    if found.size > 1 and "cpu:" not in dist.get_backend_config():
        raise SwquantError(
            f"torch.distributed was set up for {dist.get_backend_config()} alone, and losses are summed on the CPU; "
            'set it up with the backend "cpu:gloo,cuda:nccl"'
        )
    if batch < found.size:
        raise SwquantError(
            f"--batch {batch} gives {found.size} processes less than one sequence each; give --batch {found.size} or "
            "more, it is that of all together"
        )
    return found


def leave() -> None:
    """No more one of them: who waits for this process is told that it has gone."""
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
