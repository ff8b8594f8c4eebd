"""Figure 4 of DeepSpeed-MoE (arXiv:2201.05596): does distillation help to the end, and who knows when to stop?

A student of the same layers learns a text four ways at equal steps, batches and rates: without the teacher (`never`),
with it all the way (`always`), until 60 % of the steps (`0.6`), and until swquant ends the stage by itself (`auto`).
Losses, stages and the loop are those of `swquant distill`; here the loop is watched: a curve is cross entropy of text
that nothing has seen, at the start and after every quarter of the steps.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from students.world import Cell, Results, Text, World
from swquant.distill.options import DistillOptions
from swquant.distill.stages import Stages
from swquant.distill.student import StudentCheckpoint
from swquant.distill.teaching import held_out, loss_for, trainable
from swquant.models.loading import build_model
from swquant.training.loop import Schedule, train

__all__ = ["STAGINGS", "best_of", "figure4", "student_folder"]

STAGINGS = ("never", "always", "0.6", "auto")
POINTS = 4


def student_folder(world: World, text: str) -> Path:
    """Where the best student of a text is kept for `rival`."""
    return world.settings.folder / f"student-{text}"


def best_of(results: Results, text: str) -> str | None:
    """The staging whose student of the first seed has the least held-out cross entropy."""
    cells = results.parts.get("figure4", {}).get("cells", {})
    done = {staging: cells[f"{text} {staging} 0"] for staging in STAGINGS if f"{text} {staging} 0" in cells}
    return min(done, key=lambda staging: done[staging]["after"][0]) if done else None


def figure4(world: World, results: Results) -> None:
    """A cell for every text, staging and seed. The best student of each text and the first seed is kept."""
    cell = results.of("figure4", world.said("layers", "steps", "batch", "rate", "held"))
    for seed in range(world.settings.first, world.settings.seeds):
        for text in world.texts:
            for staging in STAGINGS:
                cell(f"{text.name} {staging} {seed}", lambda text=text, how=staging: _run(world, results, text, how, seed))  # noqa: B023  # fmt: skip


def _run(world: World, results: Results, text: Text, staging: str, seed: int) -> Cell:
    settings = world.settings
    options = DistillOptions(
        steps=settings.steps, batch=settings.batch, window=settings.window, lr=f"{settings.rate:g}", kd_until=staging, seed=seed
    )  # fmt: skip
    student = world.student()
    pupil = build_model(student, torch.float32, settings.device).requires_grad_(False)
    before, began = held_out(pupil, world.model, text.held, options.batch), time.perf_counter()
    curve, facts = _teach(world, student, pupil, text, options)
    seconds = time.perf_counter() - began
    after = held_out(pupil, world.model, text.held, options.batch)
    curve = [[0, before[0]], *curve, [options.steps, after[0]]]
    best = best_of(results, text.name)
    kept = results.parts["figure4"]["cells"].get(f"{text.name} {best} 0") if best else None
    if seed == 0 and (kept is None or after[0] < kept["after"][0]):
        _keep(student, pupil, student_folder(world, text.name))
    return {"curve": curve, "before": before, "after": after, "seconds": round(seconds, 1), **facts}


def _teach(
    world: World, student: StudentCheckpoint, pupil: PreTrainedModel, text: Text, options: DistillOptions
) -> tuple[list[list[float]], dict[str, Any]]:
    """Train, and watch. Returns the curve between its ends, and what `auto` found out."""
    parameters = trainable(student, pupil)
    stages = Stages(
        options.steps,
        options.rate,
        options.stage(options.steps),
        parameters,
        loss_for(pupil, world.model, text.train, options),
        lambda: held_out(pupil, None, text.looks, options.batch)[0],
    )
    points = {round(point * options.steps / POINTS) for point in range(1, POINTS)}
    curve: list[list[float]] = []

    def watched(step: int, part: int) -> Tensor:
        if step in points:
            curve.append([step, held_out(pupil, None, text.held, options.batch)[0]])
        return stages.loss(step, part)

    train(parameters, watched, Schedule(options.steps, options.rate))
    return curve, {"until": stages.facts.get("until", options.steps), "looks": stages.facts["looks"]}


def _keep(student: StudentCheckpoint, pupil: PreTrainedModel, folder: Path) -> None:
    """In bfloat16, as a folder that can be compressed."""
    shutil.rmtree(folder, ignore_errors=True)
    pupil.to(torch.bfloat16).save_pretrained(folder)
    student.save_companions(folder)
