"""The honest rival: a student of fewer layers beside the whole teacher at as many bytes.

The student as it is cut and the best one of each text (from `figure4`) are compressed at the same bits. The teacher
gets as many bits per weight (`--bits-budget`, so each tensor its own) as fill the bytes of the smallest of them, or
fewer; what is not rounded is bfloat16 everywhere. All are measured on the same text, which nobody has seen: a student
that learned it is nearer to the text than the teacher is, so that its perplexity may be lower while its KL from the
teacher is not.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import swquant
from students.figure4 import best_of, student_folder
from students.world import Cell, Results, World
from swquant.models.loading import build_model

__all__ = ["rival"]


def rival(world: World, results: Results) -> None:
    """A cell for every student and for the teacher, dense and at every number of bits."""
    cell = results.of("rival", world.said("layers", "held", "bits", "preset", "texts"))
    sources = {"cut": world.settings.folder / "student-cut"}
    _cut(world, sources["cut"])
    for text in world.texts:
        sources[text.name] = student_folder(world, text.name)
        if not sources[text.name].exists():
            raise SystemExit(f"{sources[text.name]} is not there: run --parts figure4 with this --folder first")
    cell("teacher dense", lambda: {"bytes": _dense_bytes(world), "scores": world.scores(world.model)})
    for name, folder in sources.items():
        how = best_of(results, name) if name != "cut" else None
        cell(f"{name} dense", lambda folder=folder, how=how: {**_measured(world, folder), "staging": how})
    for bits in world.settings.bits:
        students = [
            cell(f"{name} {bits}", lambda folder=folder, bits=bits: _compressed(world, folder, bits=bits))
            for name, folder in sources.items()
        ]
        smallest = min(students, key=lambda item: int(item["bytes"]))
        cell(f"teacher {bits}", lambda smallest=smallest: _teacher(world, smallest))


def _cut(world: World, folder: Path) -> None:
    """The student without training."""
    if not folder.exists():
        build_model(world.student(), torch.bfloat16).save_pretrained(folder)
        world.student().save_companions(folder)


def _dense_bytes(world: World) -> int:
    return sum(2 * form.numel for form in world.teacher.tensors.values())


def _measured(world: World, folder: Path) -> Cell:
    """bytes: of all tensors, patches included, and of no header."""
    size = sum(_tensor_bytes(file) for file in folder.rglob("*.safetensors"))
    return {
        "bytes": size,
        "scores": world.scores(swquant.load(folder, dtype=torch.float32, device=world.settings.device)),
    }


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _compressed(world: World, source: Any, **options: Any) -> Cell:
    """Compress, measure, and remove."""
    out = Path(tempfile.mkdtemp(dir=world.settings.folder)) / "out"
    try:
        options = {"preset": world.settings.preset, "dtype": "bfloat16", **options}
        if options["preset"] == "best":
            options["texts"] = world.settings.texts
        totals = swquant.compress(source, out, **options).manifest["totals"]
        weights = totals["quantized_weights"]
        return {**_measured(world, out), "bits": totals["bits_per_quantized_weight"], "weights": weights}
    finally:
        shutil.rmtree(out.parent)


def _teacher(world: World, student: Mapping[str, Any]) -> Cell:
    """The whole teacher in at most the student's bytes: its packed weights may take what all others leave."""
    plan = swquant.plan(world.source, preset="fast", dtype="bfloat16").prepared.plan
    weights = sum(tensor.source.numel for tensor in plan.quantized)
    others = plan.nbytes - sum(tensor.nbytes + tensor.sidecar_bytes for tensor in plan.quantized)
    budget = math.floor(100 * 8 * (student["bytes"] - others) / weights) / 100
    return {**_compressed(world, world.source, bits_budget=budget), "budget": budget}
