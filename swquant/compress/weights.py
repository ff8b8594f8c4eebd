"""The files that weights are written to, the shards and the sidecar, as one stream of tensors in the order of the plan.

What an interrupted run left of them is passed over, as far as every byte is the one that its journal says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.safetensors_file import FileRecord, SafetensorsWriter
from exporters.sidecar import SIDECAR, SidecarWriter
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.tensor import RoundedTensor

__all__ = ["WeightFiles"]


class WeightFiles:
    """written: how many tensors of the plan are. shards: tensor -> the file that holds it. begun: whether another
    process may have left parts of the files in `folder`."""

    def __init__(self, folder: Path, plan: Plan, *, begun: bool) -> None:
        self._folder, self._begun = folder, begun
        count = len(plan.shards)
        self._layouts = {
            f"model-{index:05d}-of-{count:05d}.safetensors": shard for index, shard in enumerate(plan.shards, start=1)
        }
        self.shards = {tensor.name: name for name, shard in self._layouts.items() for tensor in shard}
        self.written = 0
        self._tensors = plan.tensors
        self._finished: dict[str, FileRecord] = {}
        self._open: dict[str, SafetensorsWriter] = {}
        patched = [patch for tensor in plan.tensors for patch in tensor.patches]
        self._sidecar = SidecarWriter(folder / SIDECAR, patched, begun=begun) if patched else None

    @property
    def names(self) -> frozenset[str]:
        """Of all files, whether they are there yet or not."""
        return frozenset((*self._layouts, SIDECAR))

    @property
    def _writers(self) -> list[SafetensorsWriter | SidecarWriter]:
        """Of the files that are open."""
        return [*self._open.values(), *([self._sidecar] if self._sidecar is not None else [])]

    def _shard(self, tensor: TensorPlan) -> SafetensorsWriter:
        """The file for a tensor, opened with the first of its tensors, when the one before is finished."""
        name = self.shards[tensor.name]
        if name not in self._open:
            self._finish_shard()
            layout = [(key, *form) for planned in self._layouts[name] for key, form in planned.layout.items()]
            self._open[name] = SafetensorsWriter(self._folder / name, layout, {"format": "pt"}, begun=self._begun)
        return self._open[name]

    def _finish_shard(self) -> None:
        for name in list(self._open):
            self._finished[name] = self._open.pop(name).finish()

    def take_up(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Pass over the tensors that are in the files already. steps: what `write` returned of them, in order."""
        for tensor, step in zip(self._tensors, steps, strict=False):
            parts, patches = step["sha256"], step["patches"]
            expected = [name for patch in tensor.patches for name, _, _ in patch.layout]
            if list(parts) != list(tensor.layout) or list(patches) != expected:
                break
            shard = self._shard(tensor)
            in_shard = shard.holds(parts)
            in_sidecar = self._sidecar.holds(patches) if self._sidecar is not None and patches else None
            if in_shard is None or (patches and in_sidecar is None):
                break
            shard.go_on(in_shard)
            if self._sidecar is not None and in_sidecar is not None:
                self._sidecar.go_on(in_sidecar)
            self.written += 1
        self._begun = False

    def write(self, rounded: RoundedTensor) -> dict[str, dict[str, str]]:
        """Append the next tensor of the plan. Returns the sha256 of its parts and patches by stored name."""
        tensor = self._tensors[self.written]
        shard = self._shard(tensor)
        parts = {name: shard.write(name, part) for name, part in rounded.parts.items()}
        patches: dict[str, str] = {}
        for of_set, patch in rounded.patches.items():
            assert self._sidecar is not None
            patches |= self._sidecar.write(of_set, tensor.name, patch)
        self.written += 1
        return {"sha256": parts, "patches": patches}

    def flush(self) -> None:
        """Everything written so far is on the disk when this returns. Raises OSError."""
        for writer in self._writers:
            writer.flush()

    def finish(self) -> dict[str, FileRecord]:
        """Close all, which are whole now."""
        self._finish_shard()
        if self._sidecar is not None:
            self._finished[SIDECAR], self._sidecar = self._sidecar.finish(), None
        return self._finished

    def close(self) -> None:
        """Close without finishing (after an error)."""
        for writer in self._writers:
            writer.close()
