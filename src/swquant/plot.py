"""The paper's Figure 3 for any model: largest |input| and |output| of the down projections, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.errors import SwquantError

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


def plot_detection(record: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw `detection_record` to a file: two panels, log scale, super weights marked with their coordinates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [item["layer"] for item in record["layers"]]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    marks: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    for weight in (*record["super_weights"], *record["cancellers"]):
        marks.setdefault((weight["layer"], weight["row"], weight["col"]), weight)
    for panel, key, axis in ((panels[0], "input", "col"), (panels[1], "output", "row")):
        values = {item["layer"]: item[key] for item in record["layers"]}
        panel.plot(layers, [values[layer] for layer in layers], color=_BLUE, marker="o", markersize=3.5, linewidth=1.2)
        labelled: set[int] = set()
        for weight in marks.values():
            layer = weight["layer"]
            kept = weight["role"] != "canceller"
            color = _ORANGE if kept else _GREY
            panel.plot(
                [layer],
                [values[layer]],
                color=color,
                marker="*" if kept else "X",
                markersize=13 if kept else 8,
                linestyle="none",
                zorder=3,
            )
            if layer not in labelled:
                labelled.add(layer)
                side = "left" if layer < len(layers) * 0.6 else "right"
                text = f"{weight['role']}\nlayer {layer}, {axis} {weight[axis]}"
                panel.annotate(
                    text, (layer, values[layer]), xytext=(9 if side == "left" else -9, -3), textcoords="offset points",
                    ha=side, va="center", fontsize=8, color=color,
                )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xlabel("layer")
        panel.set_ylabel(f"largest |{key}|")
        panel.set_title(f"{key} of down projection", fontsize=10)
        panel.grid(True, which="major", alpha=0.25)
        panel.margins(y=0.12)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    found = len(record["super_weights"])
    figure.suptitle(f"{title}: {found or 'no'} super weight{'' if found == 1 else 's'}", fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SwquantError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
