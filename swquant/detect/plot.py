"""The paper's Figure 3 for any model: largest |input| and |output| of the down projections, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import SwquantError

if TYPE_CHECKING:
    from matplotlib.text import Annotation

__all__ = ["check_plot_file", "plot_detection"]

_FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's palette: told apart by everyone.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"


def check_plot_file(path: Path) -> None:
    """Raise SwquantError unless a figure can be written there; called before the work."""
    if path.suffix.lower() not in _FORMATS:
        raise SwquantError(f"{path}: a plot is {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    if not path.resolve().parent.is_dir():
        raise SwquantError(f"{path}: the folder {path.resolve().parent} does not exist; create it first")


def _separate(labels: list[Annotation]) -> None:
    """Move labels down until none covers another, highest first."""
    taken: list[Any] = []
    for label in sorted(labels, key=lambda label: -label.get_window_extent().y1):
        box = label.get_window_extent()
        for other in sorted(taken, key=lambda other: -other.y1):
            if box.overlaps(other):
                drop = box.y1 - other.y0 + 2
                x, y = label.xyann
                label.xyann = (x, y - drop * 72 / label.figure.dpi)  # offsets are in points, boxes in pixels
                box = box.translated(0, -drop)
        taken.append(box)


def plot_detection(record: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw `detection_record` to a file: two panels, log scale, super weights marked with their coordinates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [item["layer"] for item in record["layers"]]
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 6.2), sharex=True, layout="constrained")
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for weight in (*record["super_weights"], *record["cancellers"]):
        by_layer.setdefault(weight["layer"], []).append(weight)
    labels: list[list[Annotation]] = [[], []]
    for panel, key, placed in zip(panels, ("input", "output"), labels, strict=True):
        values = {item["layer"]: item[key] for item in record["layers"]}
        panel.plot(layers, [values[layer] for layer in layers], color=_BLUE, marker="o", markersize=3.5, linewidth=1.2)
        for layer, weights in by_layer.items():
            kept = weights[0]["role"] != "canceller"
            style = (
                {"color": _ORANGE, "marker": "*", "markersize": 13}
                if kept
                else {"color": _GREY, "marker": "X", "markersize": 8}
            )
            panel.plot([layer], [values[layer]], linestyle="none", zorder=3, **style)
            lines = [
                f"layer {layer}",
                *(f"{weight['role']} [{weight['row']}, {weight['col']}]" for weight in weights[:3]),
            ]
            early = layer < len(layers) * 0.6
            label = panel.annotate(
                "\n".join(lines), (layer, values[layer]), xytext=(10 if early else -10, 0), textcoords="offset points",
                ha="left" if early else "right", va="top", fontsize=7.5, color=style["color"], zorder=4,
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            placed.append(label)
        panel.set_yscale("log")
        panel.set_ylabel(f"largest |{key}|")
        panel.set_title(f"{key} of down projection", fontsize=10)
        panel.grid(True, which="major", alpha=0.25)
        panel.margins(y=0.12)
    panels[1].set_xlabel("layer")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    found = len(record["super_weights"])
    figure.suptitle(f"{title}: {found or 'no'} super weight{'' if found == 1 else 's'}", fontsize=11)
    figure.draw_without_rendering()  # only now is it known where the labels are
    for placed in labels:
        _separate(placed)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SwquantError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
