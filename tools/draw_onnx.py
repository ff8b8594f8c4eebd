#!/usr/bin/env python3
"""Draws docs/images/onnx.svg: one linear layer of an exported model, as a stock runtime and our library run it.

python tools/draw_onnx.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, STOCK, OURS, DATA = "#24292f", "#dbe9f9", "#d8f0dc", "#f4f1e4"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.3, height: float = 0.62) -> None:
    """A rounded box around (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, "round,pad=0.02,rounding_size=0.09", fc=color, ec=INK, lw=0.8
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=0.9, color=INK))


def draw(path: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "swquant", "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    figure, axes = plt.subplots(figsize=(9.2, 5.0))
    axes.set(xlim=(0, 13.2), ylim=(0.0, 7.1))
    axes.axis("off")

    axes.text(4.3, 6.85, "stock ONNX Runtime: the function in the file", ha="center", fontsize=10, color=INK)
    box(axes, 4.3, 6.25, "A  [rows, K]", DATA)
    box(axes, 1.5, 5.1, "Mul: massive\nchannels to zero", STOCK)
    box(axes, 4.3, 5.1, "Gather: massive\nchannels", STOCK)
    box(axes, 7.1, 5.1, "Gather: inputs\nof outliers", STOCK)
    box(axes, 1.5, 3.75, "MatMulNBits\ncodes, scales; int8", STOCK)
    box(axes, 4.3, 3.75, "MatMul, float\n[c, N] of Ŵ", STOCK)
    box(axes, 7.1, 3.75, "Mul\nw − Ŵ of outliers", STOCK)
    box(axes, 2.9, 2.5, "Add", STOCK, width=1.3)
    box(axes, 4.3, 1.35, "ScatterElements, add: to the outliers' rows", STOCK, width=4.8)
    box(axes, 4.3, 0.35, "Y  [rows, N]", DATA)
    for x in (1.5, 4.3, 7.1):
        arrow(axes, (4.3, 5.92), (x, 5.43))
        arrow(axes, (x, 4.77), (x, 4.08))
    arrow(axes, (1.5, 3.42), (2.7, 2.83))
    arrow(axes, (4.3, 3.42), (3.1, 2.83))
    arrow(axes, (2.9, 2.17), (3.6, 1.68))
    arrow(axes, (7.1, 3.42), (5.9, 1.68))
    arrow(axes, (4.3, 1.02), (4.3, 0.68))

    axes.text(11.3, 6.85, "with our library: one kernel", ha="center", fontsize=10, color=INK)
    box(axes, 11.3, 6.25, "A  [rows, K]", DATA)
    box(axes, 11.3, 3.3, "", OURS, width=3.7, height=4.2)
    axes.text(11.3, 5.15, "swquant::LinearNBits", ha="center", va="center", fontsize=9.5, color=INK)
    steps = (
        (0.0, "round A to int8, by 32 inputs"),
        (0.0, "for 16 outputs at a time:"),
        (0.3, "codes · int8, in registers"),
        (0.3, "+ channels · Ŵ, float"),
        (0.3, "+ outliers · (w − Ŵ), float"),
        (0.3, "+ bias"),
    )
    for index, (indent, step) in enumerate(steps):
        axes.text(9.6 + indent, 4.5 - 0.55 * index, step, ha="left", va="center", fontsize=8.5, color=INK)
    box(axes, 11.3, 0.35, "Y  [rows, N]", DATA)
    arrow(axes, (11.3, 5.92), (11.3, 5.43))
    arrow(axes, (11.3, 1.17), (11.3, 0.68))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs/images/onnx.svg"
    draw(Path(target))
