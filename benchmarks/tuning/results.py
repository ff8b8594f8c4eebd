"""The JSON files: cells of one group of settings each, written when they are done, read together by several processes.

A cell is what one training found, with the case that it belongs to. A process writes one file and reads any others, so
several of them may share the work of one table.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import describe as machine

from swquant.output.destination import write_whole

__all__ = ["LADDER", "Case", "Cell", "Results", "best_rate", "rates_to_try", "row_of"]

Cell = dict[str, Any]
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of learning rates


@dataclass(frozen=True)
class Case:
    """What is learned, and with how much. pool: of which layers, as `--from` says."""

    task: str
    budget: str
    pool: str

    def key(self, method: str, rate: float, seed: int) -> str:
        return f"{self.task} {method} {self.budget} {self.pool} {rate:g} {seed}"


@dataclass
class Results:
    """cells: of all files that have the settings; own: those of the file that is written."""

    path: Path
    settings: dict[str, Any]
    device: str = ""
    own: dict[str, Cell] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    @staticmethod
    def at(paths: Iterable[Path], settings: dict[str, Any], device: str) -> Results:
        """The first file is written. Stops where a file holds cells of other settings."""
        path, *others = paths
        results = Results(path, settings, device)
        for other in (*others, path):
            if not other.exists():
                continue
            known = json.loads(other.read_text())
            if known["settings"] != settings:
                raise SystemExit(f"{other} holds cells of other settings; take another file\n{known['settings']}")
            results.cells |= known["cells"]
            if other == path:
                results.own = known["cells"]
        return results

    def make(self, key: str, case: Mapping[str, Any], work: Callable[[], Cell]) -> None:
        """A cell, unless it is there. One that fails is said and left out; the others go on."""
        if key in self.cells:
            return
        try:
            cell = {**case, **work()}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = (str(error).splitlines() or [""])[0]
            print(f"{key}: FAILED, {type(error).__name__}: {said} ({where.filename}:{where.lineno})", flush=True)
            return
        self.own[key] = self.cells[key] = cell
        content = {"machine": {**machine(), "device": self.device}, "settings": self.settings, "cells": self.own}
        write_whole(self.path, json.dumps(content, indent=1).encode())
        said = " ".join(f"{name} {value:.5g}" for name, value in cell.items() if isinstance(value, float))
        print(f"{key}: {said}", flush=True)


def tried(cells: Mapping[str, Cell], case: Case, method: str) -> dict[float, float]:
    """Rate -> held-out loss of the first seed; infinity where it diverged."""
    wanted = {**asdict(case), "method": method, "seed": 0}
    found = [cell for cell in cells.values() if all(cell.get(key) == value for key, value in wanted.items())]
    return {cell["rate"]: float("inf") if cell["held_out"] is None else cell["held_out"] for cell in found}


def best_rate(cells: Mapping[str, Cell], case: Case, method: str) -> float | None:
    """The one with the least held-out loss of the first seed; None where none has been tried, or all diverged."""
    losses = {rate: loss for rate, loss in tried(cells, case, method).items() if loss < float("inf")}
    return min(losses, key=losses.__getitem__, default=None)


def rates_to_try(cells: Mapping[str, Cell], case: Case, method: str, rates: Iterable[float], more: int) -> list[float]:
    """Those of the grid that have not been tried; then, while the best lies at an end of it, the next of the ladder,
    `more` of them at most."""
    grid, losses = list(rates), tried(cells, case, method)
    if left := [rate for rate in grid if rate not in losses]:
        return left
    best = best_rate(cells, case, method)
    beyond = len([rate for rate in losses if rate not in grid])
    if best is None or beyond >= more or best not in LADDER or min(losses) < best < max(losses):
        return []
    at = LADDER.index(best) + (1 if best == max(losses) else -1)
    return [LADDER[at]] if 0 <= at < len(LADDER) and LADDER[at] not in losses else []


def row_of(cells: Mapping[str, Cell], case: Case, method: str) -> list[Cell]:
    """All seeds at the method's best rate; those that diverged are left out."""
    rate = best_rate(cells, case, method)
    wanted = {**asdict(case), "method": method, "rate": rate}
    found = [cell for cell in cells.values() if all(cell.get(key) == value for key, value in wanted.items())]
    return [cell for cell in found if rate is not None and cell["held_out"] is not None]
