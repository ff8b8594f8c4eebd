"""Going on after an interruption: of which work a journal is, and what of the weights is safe.

The head of the journal says everything that the bytes depend on: source, options, version, device, processor and
libraries, and a digest of the plan with the evidence that tensors are rounded with. Only a run with an equal head goes
on, because a result of two halves would be neither.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import torch

from exporters.errors import CheckpointError, SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.cluster.workers import WorkersError
from swquant.compress.options import CompressOptions
from swquant.compress.plan import Plan
from swquant.compress.weights import WeightFiles
from swquant.declared import flag
from swquant.detect.found import Found
from swquant.interrupts import uninterrupted
from swquant.output.journal import Journal
from swquant.output.resumable import leftover
from swquant.version import __version__

__all__ = ["Steps", "check_leftover", "head_of", "identity", "leftover_sentence", "machine"]

# What is lost at most beside the tensor that is being worked on. Waiting for the disk takes some 10 ms.
_BYTES, _SECONDS = 64 << 20, 1.0


def identity(checkpoint: Checkpoint, options: CompressOptions, device: str) -> dict[str, Any]:
    """What of the head is known before the prompt is run. device: the kind that rounds, `cpu` or `cuda`."""
    files = {}
    for path in checkpoint.files:
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns]  # the fingerprint is not over the weights
    mine = {
        "version": __version__,
        "source": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint, "files": files},
        "options": options.as_dict(),
        "device": device,
        "machine": machine(),
    }
    return json.loads(json.dumps(mine))  # as it is read again


@cache
def machine() -> dict[str, str]:
    """What sums depend on beside their terms: in another order their last bit is another."""
    return {
        "processor": f"{platform.machine()} {llvmlite.binding.get_host_cpu_name()}",
        "torch": f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        "numba": numba.__version__,
    }


def head_of(checkpoint: Checkpoint, found: Found, plan: Plan, device: str) -> dict[str, Any]:
    """The first entry of the journal."""
    digest = hashlib.sha256(repr([len(shard) for shard in plan.shards]).encode())
    for tensor in plan.tensors:
        fold = tensor.fold
        exponents = b"" if fold is None else fold.exponents.numpy().tobytes()
        energy = found.energy(tensor.name) if tensor.recipe is not None else None
        words = (tensor.name, tensor.source, dict(tensor.layout), tensor.recipe, tensor.patches, tensor.reason)
        digest.update(repr(words).encode() + exponents)
        if energy is not None:
            digest.update(energy.contiguous().numpy().tobytes())
    return {**identity(checkpoint, plan.options, device), "plan": digest.hexdigest(), "tensors": len(plan.tensors)}


def check_leftover(out: Path, mine: Mapping[str, Any]) -> None:
    """Raise SwquantError where another run is writing `out`, or an interrupted one left other work there: before hours
    are spent, and before anything of it is lost. mine: `identity` before there is a plan, `head_of` then."""
    left = leftover(out)
    if left is None:
        return
    if left.running:
        raise SwquantError(f"{out}: another run is writing it; wait for that to end, or give another OUT")
    if (other := _other(left.head, mine)) is not None:
        raise SwquantError(
            f"{out}: an interrupted run left {left}, with {other}; --fresh starts over, or give another OUT"
        )


def leftover_sentence(out: Path, head: Mapping[str, Any]) -> str:
    """What `--dry-run` says of what an interrupted run left of `out`; "" if that is nothing."""
    left = leftover(out)
    if left is None:
        return ""
    if left.running:
        return "another run is writing OUT"
    other = _other(left.head, head)
    return f"an interrupted run left {left}" + (
        ", compress goes on from there" if other is None else f", with {other}: compress will ask for --fresh"
    )


def _other(head: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """In what a journal's work differs from this one, for people; None if in nothing. mine: may lack the plan."""
    if head.get("version") != mine["version"]:
        return f"swquant {head.get('version')}"
    if head.get("source") != mine["source"]:
        same = all(head["source"].get(key) == mine["source"][key] for key in ("name", "fingerprint"))
        return "a source whose files were changed since" if same else f"another source ({head['source'].get('name')})"
    if head.get("options") != mine["options"]:
        return f"other options ({_difference(head.get('options', {}), mine['options'], flag)})"
    if head.get("device") != mine["device"]:
        return f"device {head.get('device')}"
    if head.get("machine") != mine["machine"]:
        return f"another processor or libraries ({_difference(head.get('machine', {}), mine['machine'])})"
    if "plan" in mine and head.get("plan") != mine["plan"]:
        return "another plan"
    return None


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any], called: Callable[[str], str] = str) -> str:
    return ", ".join(
        f"{called(name)} {theirs.get(name)}, now {mine[name]}" for name in mine if theirs.get(name) != mine[name]
    )


class Steps:
    """What of the weights is on the disk. A step is believed by the next run only if its bytes were there before the
    journal said so, hence the batches: waiting for the disk after every norm would take longer than the work."""

    def __init__(self, journal: Journal, files: WeightFiles) -> None:
        self._journal, self._files = journal, files
        files.take_up(journal.entries)
        journal.cut(files.written)
        self.done: list[Mapping[str, Any]] = list(journal.entries)
        self.taken_up = len(self.done)
        self._safe = self.taken_up
        self._bytes, self._since = 0, time.monotonic()

    def add(self, step: Mapping[str, Any], nbytes: int) -> None:
        """A tensor was written."""
        self.done.append(step)
        self._bytes += nbytes
        if self._bytes >= _BYTES or time.monotonic() - self._since >= _SECONDS:
            self.save()

    def save(self) -> None:
        """Everything written so far can be taken up when this returns. Raises OSError."""
        self._files.flush()
        self._journal.append(self.done[self._safe :])
        self._safe = len(self.done)
        self._bytes, self._since = 0, time.monotonic()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """What the block writes is kept if it is interrupted, but not if what it was given cannot be carried out: then
        the next run will be another."""
        try:
            yield
        except BaseException as error:
            with uninterrupted(), suppress(OSError):
                if isinstance(error, SwquantError) and not isinstance(error, CheckpointError | WorkersError):
                    self._journal.forget()
                else:
                    self.save()
            raise
