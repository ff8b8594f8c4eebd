"""A detection as a section of a page: what was found, the paper's Figure 3, and the evidence as tables.

Both pages have it, the report of a compressed checkpoint and the study's first experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from calibrationless import Detection, LayerSpike, SuperWeight
from swquant.detect.found import Found
from swquant.drawing.section import Chart, Mark, Section, Series, Table, number

__all__ = ["describe"]

PAPER = (
    "Super weights are found with one forward pass of one prompt, as spikes in input and output of a down projection. "
    "The paper lists one to six per model, most of them in layers 1 to 4 (Figures 3 and 10, Table 2)."
)


def describe(found: Found) -> Section:
    """The same, from a detection alone."""
    detection = found.detection
    return Section(
        name="identify",
        title="How to identify super weights",
        paper=PAPER,
        finding=_finding(found),
        agrees=bool(detection.super_weights),
        charts=tuple(_chart(detection, which) for which in ("input", "output")),
        tables=(_weights(detection.super_weights, detection.cancellers), _layers(detection.layers)),
    )


def _finding(found: Found) -> str:
    detection, layers = found.detection, len(found.architecture.layers)
    spike = max(detection.layers, key=lambda item: item.output)
    usual = median(item.output for item in detection.layers)
    blind = (
        f" Layer {', '.join(map(str, found.unseen_layers))} was not looked at: no product of a down projection was seen."
        if found.unseen_layers
        else ""
    )
    if not detection.super_weights:
        times = f", {number(spike.output / usual)} times the median layer's" if usual else ""  # layers that give zeros
        return (
            f"No super weight was found on the prompt “{found.prompt}”. The largest output of a down projection is "
            f"{number(spike.output)} in layer {spike.layer}{times}.{blind}"
        )
    first = detection.super_weights[0]
    others = len(detection.super_weights) - 1
    more = f" and {others} more" if others else ""
    return (
        f"{len(detection.super_weights)} found: layers[{first.layer}] [{first.row}, {first.col}]{more}, of {layers} layers. "
        f"This scalar makes {first.share:.0%} of an output of {number(abs(first.output))}; the median layer's largest output "
        f"is {number(usual)}. Channel {first.row} of the residual stream then holds {number(abs(first.residual))}.{blind}"
    )


def _chart(detection: Detection, which: str) -> Chart:
    values = {item.layer: float(getattr(item, which)) for item in detection.layers}
    marks = [
        Mark(layer, values[layer], _label(layer, detection.super_weights), kept=True)
        for layer in sorted({weight.layer for weight in detection.super_weights})
    ] + [
        Mark(layer, values[layer], "canceller", kept=False)
        for layer in sorted({weight.layer for weight in detection.cancellers})
    ]
    marked = ", ".join(str(mark.x) for mark in marks if mark.kept) or "none"
    return Chart(
        name=f"identify-{which}",
        title=f"Largest |{which}| of the down projections",
        alt=f"Largest magnitude of the {which} of each layer's down projection; layers with super weights: {marked}.",
        xlabel="layer",
        ylabel=f"largest |{which}|",
        series=(Series(f"largest |{which}|", tuple(map(float, values)), tuple(values.values())),),
        marks=tuple(marks),
        ylog=True,
    )


def _label(layer: int, weights: Sequence[SuperWeight]) -> str:
    own = [weight for weight in weights if weight.layer == layer]
    more = f" +{len(own) - 1}" if len(own) > 1 else ""
    return f"{layer}: [{own[0].row}, {own[0].col}]{more}"


def _weights(weights: Sequence[SuperWeight], cancellers: Sequence[SuperWeight]) -> Table:
    rows = tuple(
        (
            weight.role, weight.layer, f"[{weight.row}, {weight.col}]", weight.value, weight.input, weight.output, weight.share,
            weight.residual, None if weight.role == "canceller" else weight.kl,
        )
        for weight in (*weights, *cancellers)
    )  # fmt: skip
    return Table(
        "super-weights",
        "Super weights, and the cancellers that take the super activation away. KL: of the predictions on the prompt, when "
        "this one scalar is left out.",
        (
            "role",
            "layer",
            "[row, col]",
            "value",
            "input",
            "output",
            "share of output",
            "residual channel",
            "KL if pruned",
        ),
        rows,
    )


def _layers(layers: Sequence[LayerSpike]) -> Table:
    return Table(
        "layers",
        "Largest |input| and |output| of each layer's down projection, and their channels.",
        ("layer", "largest |input|", "input channel", "largest |output|", "output channel"),
        tuple((item.layer, item.input, item.input_channel, item.output, item.output_channel) for item in layers),
    )
