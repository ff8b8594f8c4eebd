"""Where super weights are in students and mixtures, what leaving out their layers does, and what compressing them does.

All are detected anew in every model, by `swquant detect`'s own pipeline with its one prompt. A layer that is left out
hands on what it is given. "plain" is rounding alone at 4 bits with one scale per row, where a super weight matters
most, with and without the weights that the sidecar restores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import swquant
from students.world import Cell, Results, World
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.pipeline import find_super_weights
from swquant.distill.measure import leaving_out, super_layers
from swquant.distill.student import StudentCheckpoint
from swquant.models.loading import build_model

__all__ = ["super_weights"]

PLAIN: dict[str, Any] = {"preset": "fast", "bits": 4, "block": "channel", "outliers": 0.0}


def super_weights(world: World, results: Results) -> None:
    """Cells: what is found in each model; every layer left out alone; students and mixture rounded plainly."""
    cell = results.of("super", world.said("layers", "held"))
    found = find_super_weights(world.teacher, model=world.model)
    roles = super_layers(found)
    cell("found teacher", lambda: _found(world.teacher, world.model))
    cell("found student", lambda: _found(world.student()))
    makers = [layer for layer, role in roles.items() if role == "creates"]
    for layer in makers:
        rest = [other for other in range(len(world.layers)) if other != layer]
        without = StudentCheckpoint(world.teacher, rest, world.layers)
        cell(f"found without {layer}", lambda without=without: _found(without))
    other = build_model(world.teacher, torch.float32, world.settings.device)
    for layer, name in enumerate(world.layers):
        cell(f"without {layer}", lambda layer=layer, name=name: _without(world, other, name, roles.get(layer, "")))
    with tempfile.TemporaryDirectory(dir=world.settings.folder) as folder:
        student, mixture = Path(folder) / "student", Path(folder) / "mixture"
        swquant.distill(world.source, student, layers=",".join(map(str, world.keep)))
        swquant.moe(world.source, mixture, experts="pyramid:2", expert_size=64)
        with open_checkpoint(mixture) as opened:
            cell("found mixture", lambda: _found(opened))
        for name, model in (("student", student), ("mixture", mixture)):
            cell(f"plain {name}", lambda model=model: _plain(world, model))


def _found(checkpoint: Checkpoint, model: Any = None) -> Cell:
    """What is found, cancellers included."""
    running = build_model(checkpoint, torch.float32) if model is None else model
    detection = find_super_weights(checkpoint, model=running).detection
    listed = [
        {"name": weight.name, "row": weight.row, "col": weight.col, "role": weight.role, "output": weight.output}
        for weight in (*detection.super_weights, *detection.cancellers)
    ]
    return {"weights": listed}


def _without(world: World, other: nn.Module, layer: str, role: str) -> Cell:
    """Of the first text. other: a second teacher, in which the layer is left out."""
    with leaving_out(other, [layer]):
        return {"role": role, "scores": world.scores(other, world.texts[:1])}


def _plain(world: World, model: Path) -> Cell:
    """Rounded plainly, with the sidecar and without; KL is from the teacher, as everywhere."""
    out = Path(tempfile.mkdtemp(dir=model.parent)) / "out"
    swquant.compress(model, out, **PLAIN)
    kinds = {"restored": True, "as rounded": False}
    models = {
        kind: swquant.load(out, dtype=torch.float32, device=world.settings.device, restore=restore)
        for kind, restore in kinds.items()
    }
    return {kind: world.scores(running, world.texts[:1]) for kind, running in models.items()}
