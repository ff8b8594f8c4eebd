"""What a cell of the tables is (`cells.py` keeps them), and at which learning rates a method is tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LADDER", "Case", "Cell", "best_rate", "rates_to_try", "row_of", "said"]

Cell = dict[str, Any]  # what one training found, with the case that it belongs to
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of learning rates


@dataclass(frozen=True)
class Case:
    """What is learned, and with how much. pool: of which layers, as `--from` says."""

    task: str
    budget: str
    pool: str

    def key(self, method: str, rate: float, seed: int) -> str:
        return f"{self.task} {method} {self.budget} {self.pool} {rate:g} {seed}"


def said(cell: Cell) -> str:
    """In a line."""
    return " ".join(f"{name} {value:.5g}" for name, value in cell.items() if isinstance(value, float))


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
