"""Charts as SVG: small, with text as text, told apart by everyone, light and dark.

matplotlib draws; then its colours are replaced by CSS variables with the light colours as fallback, so that a figure
follows the page that it stands in, or, alone in a file, the reader's own light or dark setting. Colours are those of
Okabe and Ito, and every series has a marker and a dash of its own besides. Equal charts give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swquant.drawing.section import Bars, Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "draw", "standalone"]

# variable -> (light, dark). The light ones are what matplotlib draws with, so each must be unique.
COLOURS = {
    "ink": ("#1a1c1f", "#e8e6e3"),
    "faint": ("#5c6066", "#a9adb3"),
    "grid": ("#d5d8dc", "#3c4148"),
    "paper": ("#fefefe", "#16181c"),
    "series-1": ("#0072b2", "#56b4e9"),
    "series-2": ("#d55e00", "#ff9f5a"),
    "series-3": ("#007a5a", "#2fcf9f"),
    "series-4": ("#a0418c", "#e29ad0"),
}
_SERIES = [COLOURS[f"series-{index}"][0] for index in range(1, 5)]
_MARKERS, _DASHES = ("o", "s", "^", "D"), ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))
_INK, _FAINT, _GRID, _PAPER = (COLOURS[name][0] for name in ("ink", "faint", "grid", "paper"))
# Inches. At this size a phone shows the text at about 9 pixels and a desktop, two beside each other, at its own.
_WIDTH, _HEIGHT = 4.8, 3.1
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "swquant", "font.family": "sans-serif", "font.size": 10, "text.color": _INK,
    "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "axes.titlesize": 10.5, "axes.titlecolor": _INK, "xtick.color": _FAINT,
    "ytick.color": _FAINT, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "grid.color": _GRID, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 4.5, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "axes.axisbelow": True,
}  # fmt: skip


def draw(chart: Chart | Bars) -> str:
    """The chart as one <svg> element, which may stand in a page or in a file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        entries = len(chart.labels if isinstance(chart, Bars) else chart.series)
        legend = math.ceil(entries / 2) if entries > 1 else 0  # rows
        height = max(_HEIGHT, 1.1 + 0.38 * len(chart.categories)) if isinstance(chart, Bars) else _HEIGHT
        height += 0.2 * max(0, legend - 1)
        # Fixed margins: neighbours line up, and nothing has to be laid out twice to find out how wide its labels are.
        figure = Figure(figsize=(_WIDTH, height))
        below = 0.6 + 0.22 * legend
        left = 0.03 if isinstance(chart, Bars) else 0.175
        figure.subplots_adjust(left=left, right=0.97, top=1 - 0.32 / height, bottom=below / height)
        axes = figure.subplots()
        if isinstance(chart, Bars):
            _bars(figure, axes, chart)
        else:
            _curves(figure, axes, chart)
        axes.set_title(chart.title, loc="left")
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that its own font lacks: the reader's font draws them
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), chart.name, chart.alt)


def _finite(value: float, log: bool) -> float:
    """NaN, which is not drawn, for what an axis cannot show."""
    return value if math.isfinite(value) and value < 1e300 and (value > 0 or not log) else math.nan


def _clean(values: Sequence[float], log: bool) -> list[float]:
    return [_finite(value, log) for value in values]


def _log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A log axis with plain numbers at its ticks; also between the decades where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    shown = [value for value in values if math.isfinite(value) and value > 0]
    span = math.log10(max(shown) / min(shown)) if shown else 0.0
    axis = getattr(axes, f"{which}axis")
    steps = (1.0,) if span > 2.5 else (1.0, 2.0, 5.0) if span > 0.6 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    if value >= 1e5 or 0 < value < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _curves(figure: Figure, axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import blended_transform_factory

    shown: list[float] = []
    for index, series in enumerate(chart.series):
        style: Any = {
            "color": _SERIES[index % 4], "marker": _MARKERS[index % 4], "linestyle": _DASHES[index % 4] if series.line else "none",
        }  # fmt: skip
        y = _clean(series.y, chart.ylog)
        shown += y
        axes.plot(series.x, y, label=series.label, zorder=3, **style)
        if series.low is not None and series.high is not None:
            low, high = _clean(series.low, chart.ylog), _clean(series.high, chart.ylog)
            shown += low + high
            axes.fill_between(series.x, low, high, color=_SERIES[index % 4], alpha=0.18, linewidth=0, zorder=2)
    for mark in chart.marks:
        _mark(axes, mark.x, mark.y, mark.label, mark.kept, early=mark.x < 0.55 * max(chart.series[0].x, default=1))
    axes.set_xlabel(chart.xlabel)
    axes.set_ylabel(chart.ylabel)
    # At the edge of the figure, however wide the numbers beside it are in the reader's font.
    axes.yaxis.set_label_coords(0.028, 0.5, transform=blended_transform_factory(figure.transFigure, axes.transAxes))
    if chart.xlog:
        _log(axes, "x", [x for series in chart.series for x in series.x])
    elif chart.xlabel.startswith(("layer", "after layer")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.ylog:
        _log(axes, "y", shown)
    axes.grid(True, which="major", linewidth=0.7)
    axes.margins(x=0.04, y=0.12)
    if len(chart.series) > 1:
        figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=9)


def _mark(axes: Axes, x: float, y: float, label: str, kept: bool, *, early: bool) -> None:
    colour, marker, size = (_SERIES[1], "*", 13) if kept else (_FAINT, "X", 7)
    axes.plot([x], [y], linestyle="none", marker=marker, markersize=size, color=colour, zorder=4)
    if kept:
        axes.annotate(
            label, (x, y), xytext=(8 if early else -8, 0), textcoords="offset points", ha="left" if early else "right",
            va="center", fontsize=9, color=colour, zorder=5,
            bbox={"facecolor": _PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip


def _bars(figure: Figure, axes: Axes, chart: Bars) -> None:
    from matplotlib.transforms import blended_transform_factory

    shown: list[float] = []
    across = blended_transform_factory(axes.transAxes, axes.transData)
    for row, category in enumerate(chart.categories):
        axes.text(0.0, row - 0.32, category, transform=across, fontsize=9, va="center", zorder=5)
        for index, values in enumerate(chart.values):
            item = values[row]
            place = row + 0.08 + 0.22 * index
            value = _finite(item.value, chart.xlog)
            low = value if item.low is None else _finite(item.low, chart.xlog)
            high = value if item.high is None else _finite(item.high, chart.xlog)
            shown += [value, low, high]
            colour = _SERIES[index % 4]
            axes.plot(
                [low, high], [place, place], color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt", zorder=2
            )
            label = chart.labels[index] if row == 0 else None
            axes.plot(
                [value],
                [place],
                linestyle="none",
                marker=_MARKERS[index % 4],
                markersize=6,
                color=colour,
                label=label,
                zorder=3,
            )
    axes.set_ylim(len(chart.categories) - 0.45, -0.65)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(chart.xlabel)
    if chart.xlog:
        _log(axes, "x", shown)
    else:
        axes.set_xlim(left=0)
    axes.grid(True, axis="x", linewidth=0.7)
    if len(chart.labels) > 1:
        figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=9)


def _themed(svg: str, name: str, alt: str) -> str:
    """Colours become variables, ids unique to the chart, and what screen readers need is added."""
    from html import escape

    body = svg[svg.index("<svg") :]
    for variable, (light, _) in COLOURS.items():
        body = re.sub(re.escape(light), f"var(--{variable}, {light})", body, flags=re.IGNORECASE)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert size is not None
    # The width of the place it stands in; a file of its own is opened at its natural size.
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size[0][9:-1]}" '
        f'width="{size[1]}pt" height="{size[2]}pt" role="img" class="chart" aria-label="{escape(alt, quote=True)}">'
    )
    return opening + re.sub(r"^<svg[^>]*>", "", body).strip() + "\n"


def standalone(svg: str) -> str:
    """A chart as the content of a file: it follows the reader's light or dark setting by itself."""
    light = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    style = (
        f"<style>svg{{{light}background:var(--paper)}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
        "text{font-family:system-ui,sans-serif}</style>"
    )
    return '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1)
