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
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 6.2), sharex=True, layout="constrained")
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for weight in (*record["super_weights"], *record["cancellers"]):
        by_layer.setdefault(weight["layer"], []).append(weight)
    for panel, key in zip(panels, ("input", "output"), strict=True):
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
            panel.annotate(
                "\n".join(lines), (layer, values[layer]), xytext=(10 if early else -10, 0), textcoords="offset points",
                ha="left" if early else "right", va="top", fontsize=7.5, color=style["color"], zorder=4,
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_ylabel(f"largest |{key}|")
        panel.set_title(f"{key} of down projection", fontsize=10)
        panel.grid(True, which="major", alpha=0.25)
        panel.margins(y=0.12)
    panels[1].set_xlabel("layer")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    found = len(record["super_weights"])
    figure.suptitle(f"{title}: {found or 'no'} super weight{'' if found == 1 else 's'}", fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SwquantError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
