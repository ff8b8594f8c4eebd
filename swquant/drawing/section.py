"""What an experiment hands over: sentences, tables and charts as plain data, drawn and laid out elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from swquant.units import thousands

__all__ = ["Bars", "Cell", "Chart", "Interval", "Mark", "Section", "Series", "Table", "number"]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval, which are None where one window leaves nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


Cell: TypeAlias = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """rows: as many cells each as there are columns. None: does not apply. name: of its CSV file."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Series:
    """Points (x[i], y[i]), low and high the ends of their intervals. line: whether the points are joined."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    line: bool = True


@dataclass(frozen=True)
class Mark:
    """A point to be singled out. kept: a super weight, as opposed to a canceller."""

    x: float
    y: float
    label: str
    kept: bool = True


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis. name: of its file. alt: what it shows, for those who cannot see it."""

    name: str
    title: str
    alt: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    xlog: bool = False
    ylog: bool = False


@dataclass(frozen=True)
class Bars:
    """One horizontal line per category with a point, and its interval, for each series. values: [series][category]."""

    name: str
    title: str
    alt: str
    xlabel: str
    categories: tuple[str, ...]
    labels: tuple[str, ...]
    values: tuple[tuple[Interval, ...], ...]
    xlog: bool = False


@dataclass(frozen=True)
class Section:
    """The result of one experiment.

    paper: what the paper found. finding: what this model shows. agrees: whether the two say the same; None where the
    experiment could not be made, then `finding` says why.
    """

    name: str
    title: str
    paper: str
    finding: str
    agrees: bool | None = None
    charts: tuple[Chart | Bars, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def number(value: Any) -> str:
    """Four significant digits, thousands separated; `not finite` for what is no number."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return thousands(value)
