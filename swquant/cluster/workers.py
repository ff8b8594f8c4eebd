"""An ordered map over many workers: Ray's processes on this machine, or on the machines of a cluster.

    with team(Workers(count=8)) as workers:
        for result in workers.in_order(function, shared, tasks, nbytes): ...

Ray does what an engine has to: it starts processes, moves values through its object store, and does the tasks of a lost
worker again on another. Here is what it leaves to its users: results in the order of the tasks, not more of them under
way than memory holds, and errors in one line, found before the work.

`function` must be importable by name where the workers run. Ray pickles what it moves: whoever reaches a cluster's port
can run code on it, so a cluster belongs into a network of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from exporters.errors import SwquantError, first_line

__all__ = ["Team", "Workers", "WorkersError", "team"]

Task = TypeVar("Task", bound=tuple[Any, ...])
Result = TypeVar("Result")

_TRIES = 5  # of a task whose worker dies: beyond, it is the task that kills
_SECONDS = 5.0  # that an address may take to answer
_BYTES = 512 << 20  # of results under way, where that is enough for all workers
# HTTP/2's first words, an empty frame of settings behind them; whoever speaks it answers with settings of its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class WorkersError(SwquantError):
    """The workers failed, not the work: what is done stays good."""


@dataclass(frozen=True)
class Workers:
    """Who works: so many processes on this machine, or those of the Ray cluster at an address. One worker and no
    address: this process, without Ray. Raises SwquantError for what cannot be."""

    count: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.address is not None:
            raise SwquantError(f"--workers {self.count} are of this machine, --ray {self.address} has its own; use one")
        if self.count is not None and not 1 <= self.count <= 1024:
            raise SwquantError(f"workers {self.count} is outside 1 to 1024; the number of cores is a good one")

    @property
    def here(self) -> bool:
        """Whether this process does the work itself."""
        return self.address is None and self.count in (None, 1)

    def check(self) -> None:
        """Raise SwquantError where they are not to be had: before the work."""
        if self.here:
            return
        if importlib.util.find_spec("ray") is None:
            raise SwquantError('workers need Ray, which is not installed: pip install "swquant[ray]"')
        if self.address not in (None, "auto"):
            _check_answers(str(self.address))


def _check_answers(address: str) -> None:
    """Raise SwquantError unless something like Ray answers: left to itself, Ray waits for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "give HOST:PORT of the head of a running cluster, see ray status"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SwquantError(f"--ray {address}: not an address; {remedy}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS) as connection:
            connection.settimeout(_SECONDS)
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except OSError as error:  # a name that is none, nobody there, nothing said
        raise SwquantError(f"--ray {address}: does not answer ({error.strerror or error}); {remedy}") from None
    if len(answer) < 4 or answer[3] != 4:
        raise SwquantError(f"--ray {address}: what answers there is not Ray; {remedy}")


class Team:
    """Workers that are there. Made by `team`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    @property
    def slots(self) -> int:
        """How many tasks can run at once."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def everywhere(self, function: Callable[..., Result], *arguments: Any) -> dict[str, Result]:
        """Machine -> what a function gives there. Raises what it raises; WorkersError where a machine has no place."""
        affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {}
        for node in self._ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
                there = self._ray.remote(function).options(scheduling_strategy=affinity(node["NodeID"], soft=False))
                asked[f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"] = there.remote(*arguments)
        if not asked:
            raise WorkersError("the Ray cluster has no machine with a free core; wait, or add one")
        return {name: self._value(reference, f"{name}: ") for name, reference in asked.items()}

    def in_order(
        self, function: Callable[..., Result], shared: Any, tasks: Iterable[Task], nbytes: Callable[[Task], int]
    ) -> Iterator[tuple[Task, Result]]:
        """(task, function(shared, *task)) for every task, in their order. nbytes: about as much as a task and its
        result take; what is under way is bounded by it. Raises what the function raises, and WorkersError."""
        remote = self._ray.remote(function).options(max_retries=_TRIES)
        shared = self._ray.put(shared)
        slots = self.slots
        waiting: deque[tuple[Task, int, Any]] = deque()
        under_way = largest = 0

        def first() -> tuple[Task, Result]:
            nonlocal under_way
            task, size, reference = waiting.popleft()
            under_way -= size
            return task, self._value(reference)

        try:
            for task in tasks:
                size = nbytes(task)
                largest = max(largest, size)
                while waiting and (len(waiting) >= 2 * slots or under_way + size > max(_BYTES, (slots + 1) * largest)):
                    yield first()
                waiting.append((task, size, remote.remote(shared, *task)))
                under_way += size
            while waiting:
                yield first()
        finally:
            for _, _, reference in waiting:
                self._ray.cancel(reference, force=False)

    def _value(self, reference: Any, where: str = "") -> Any:
        """What a task gave. Its own errors are raised as they were; those of the workers are a WorkersError."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SwquantError):
                raise type(cause)(f"{where}{cause}") from None
            if isinstance(cause, ImportError | AttributeError):
                raise WorkersError(
                    f"{where}a worker lacks what this process has ({first_line(cause)}); install the same there"
                ) from None
            raise
        except errors.RayError as error:
            raise WorkersError(
                f"{where}a worker was lost {_TRIES} times or more at the same task ({first_line(error)}); has it too little memory?"
            ) from None


@contextmanager
def team(workers: Workers) -> Iterator[Team | None]:
    """The workers, while the block runs; None where this process does the work. Raises SwquantError."""
    workers.check()
    if workers.here:
        yield None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a change to come
    import ray
    import ray.exceptions
    import ray.util.scheduling_strategies

    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": workers.address} if workers.address else {"num_cpus": workers.count}
        try:
            with _same_sigterm():
                ray.init(**where, include_dashboard=False if workers.address is None else None,
                         logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:  # another version of Ray or Python, too
            raise SwquantError(
                f"--{'ray' if workers.address else 'workers'} {workers.address or workers.count}: Ray does not start ({first_line(error)})"
            ) from None
    try:
        yield Team(ray)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Ray installs a handler of its own; swquant has one that puts things in order first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
