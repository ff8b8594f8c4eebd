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
    figure, axes = plt.subplots(figsize=(10.4, 5.0))
    axes.set(xlim=(0, 15.1), ylim=(0.0, 7.1))
    axes.axis("off")

    axes.text(5.3, 6.85, "stock ONNX Runtime: the function in the file", ha="center", fontsize=10, color=INK)
    box(axes, 5.3, 6.25, "A  [rows, K]", DATA)
    branches = (
        (1.3, "Mul: massive\nchannels to zero", "MatMulNBits\ncodes, scales; int8"),
        (3.95, "Gather: massive\nchannels", "MatMul, float\n[c, N] of Ŵ"),
        (6.6, "ReduceSum: inputs\nof each block", "MatMul, float\n[blocks, N] offsets"),
        (9.25, "Gather: inputs\nof outliers", "Mul\nw − Ŵ of outliers"),
    )
    for x, first, second in branches:
        box(axes, x, 5.1, first, STOCK)
        box(axes, x, 3.75, second, STOCK)
        arrow(axes, (5.3, 5.92), (x, 5.43))
        arrow(axes, (x, 4.77), (x, 4.08))
    box(axes, 3.95, 2.5, "Add", STOCK, width=1.5)
    for x, to in ((1.3, 3.5), (3.95, 3.95), (6.6, 4.4)):
        arrow(axes, (x, 3.42), (to, 2.83))
    box(axes, 5.3, 1.35, "ScatterElements, add: to the outliers' rows", STOCK, width=4.8)
    box(axes, 5.3, 0.35, "Y  [rows, N]", DATA)
    arrow(axes, (3.95, 2.17), (4.5, 1.68))
    arrow(axes, (9.25, 3.42), (6.7, 1.68))
    arrow(axes, (5.3, 1.02), (5.3, 0.68))

    axes.text(13.1, 6.85, "with our library: one kernel", ha="center", fontsize=10, color=INK)
    box(axes, 13.1, 6.25, "A  [rows, K]", DATA)
    box(axes, 13.1, 3.3, "", OURS, width=3.7, height=4.2)
    axes.text(13.1, 5.15, "swquant::LinearNBits", ha="center", va="center", fontsize=9.5, color=INK)
    steps = (
        (0.0, "round A to int8, by 32 inputs"),
        (0.0, "for 16 outputs at a time:"),
        (0.3, "(codes − zero point) · int8"),
        (0.3, "+ channels · Ŵ, float"),
        (0.3, "+ outliers · (w − Ŵ), float"),
        (0.3, "+ bias"),
    )
    for index, (indent, step) in enumerate(steps):
        axes.text(11.4 + indent, 4.5 - 0.55 * index, step, ha="left", va="center", fontsize=8.5, color=INK)
    box(axes, 13.1, 0.35, "Y  [rows, N]", DATA)
    arrow(axes, (13.1, 5.92), (13.1, 5.43))
    arrow(axes, (13.1, 1.17), (13.1, 0.68))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs/images/onnx.svg"
    draw(Path(target))
