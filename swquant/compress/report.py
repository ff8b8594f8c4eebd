"""`swquant/report.html` of a compressed checkpoint: what is in it, for whoever opens the folder in a year.

The study's page, shorter: it says what detection found and what rounding cost, from numbers that `compress` has anyway.
It depends on nothing but the result, so equal checkpoints have equal reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from swquant.checkpoints.manifest import rounded, stored_as
from swquant.checkpoints.schema import RoundedRecord, TensorRecord
from swquant.compress.loaders import loader_table
from swquant.detect.section import describe
from swquant.drawing.charts import draw
from swquant.drawing.page import facts, page, section_html
from swquant.drawing.section import Cell, Chart, Section, Series, Table
from swquant.units import human_bytes
from swquant.version import __version__

if TYPE_CHECKING:
    from swquant.compress.options import CompressOptions
    from swquant.compress.plan import Plan
    from swquant.detect.found import Found

__all__ = ["REPORT", "checkpoint_report"]

REPORT = "swquant/report.html"
_WORST = 10


def checkpoint_report(name: str, found: Found, plan: Plan, records: Mapping[str, TensorRecord]) -> str:
    """The page. name: of the source. records: the manifest's of every tensor."""
    options = plan.options
    bits = options.bits if options.bits_budget is None else "own bits for each tensor"
    pairs = (
        ("source", name),
        ("weights", f"{human_bytes(plan.source_bytes)} became {human_bytes(plan.nbytes)}"),
        ("bits per quantized weight", f"{plan.bits_per_weight:.3f}"),
        ("bits, block", f"{bits}, {options.block_name}, {'symmetric' if options.symmetric else 'asymmetric'}"),
        *((table.table, str(plan.scheme(table))) for table in plan.tables),
        (
            "scales searched with",
            {"none": "nothing", "prompt": "the one prompt"}.get(options.refinement, options.refinement),
        ),
        ("clipped", options.clip),
        ("activations", _activations(options)),
        ("kept exactly", _kept(options)),
        *((f"loads in {loader}", verdict) for loader, verdict in loader_table(plan).items()),
        ("made with", f"swquant {__version__}"),
    )
    lead = (
        "A compressed checkpoint. Nothing here was measured on text: swquant eval compares it with the original, swquant study "
        "makes the experiments of the paper, swquant inspect and manifest.json hold every detail.",
    )
    sections = (describe(found), _rounding(found, plan, records), _tensors(records))
    drawn = {chart.name: draw(chart) for section in sections for chart in section.charts}
    return page(f"{name}, compressed", lead, [facts(pairs), *(section_html(section, drawn) for section in sections)])


def _kept(options: CompressOptions) -> str:
    if not options.restore:
        return "nothing"
    share = options.outlier_fraction
    return f"super weights and {share:.2%} more" if share else "super weights"


def _activations(options: CompressOptions) -> str:
    if options.activations == "none":
        return "float"
    scale = "one scale per token" if options.per_token else "one scale per tensor"
    where = "the one prompt's" if options.static else "each input's own"
    return f"{options.activations}, {scale}, {where}{', massive channels in float' if options.restore else ''}"


def _rounding(found: Found, plan: Plan, records: Mapping[str, TensorRecord]) -> Section:
    tensors = rounded(records)
    errors = {name: record["relative_error"] for name, record in tensors.items()}
    by_layer: dict[int, list[float]] = {}
    for name in [name for name in errors if name in found.architecture.weights]:
        by_layer.setdefault(found.architecture.weights[name].layer, []).append(errors[name])
    layers = tuple(map(float, sorted(by_layer)))
    values = [by_layer[layer] for layer in sorted(by_layer)]
    chart = Chart(
        name="rounding",
        title="Relative error of the rounded tensors",
        alt="Median and largest relative error of the rounded tensors of every layer.",
        xlabel="layer",
        ylabel="||w - q|| / ||w||",
        series=(
            Series("median of the layer", layers, tuple(map(median, values))),
            Series("largest", layers, tuple(map(max, values))),
        ),
    )
    worst = sorted(errors, key=lambda name: -errors[name])[:_WORST]
    kept = sum(record["outliers"] for record in tensors.values())
    return Section(
        name="rounding",
        title="What rounding changed",
        paper="",
        finding=(
            f"{len(errors)} tensors were rounded, with a median relative error of {median(errors.values()):.3g}; {kept:,} weights "
            f"are kept exactly in the sidecar."
        ),
        charts=(chart,),
        tables=(
            Table(
                "worst",
                "The tensors with the largest relative errors.",
                ("tensor", "stored as", "relative error", "largest error", "weights in the sidecar"),
                tuple(_worst_row(name, tensors[name]) for name in worst),
            ),
            Table(
                "safety",
                "Super weights in rounded tensors, and what a loader sees that ignores the sidecar.",
                ("tensor", "[row, col]", "value", "without sidecar"),
                tuple(
                    (name, f"[{point['row']}, {point['col']}]", point["value"], point["without_sidecar"])
                    for name, record in tensors.items()
                    for point in record.get("super_weights", ())
                ),
            ),
        ),
        notes=plan.notes,
    )


def _worst_row(name: str, record: RoundedRecord) -> tuple[Cell, ...]:
    return name, record["stored_as"], record["relative_error"], record["largest_error"], record["outliers"]


def _tensors(records: Mapping[str, TensorRecord]) -> Section:
    kinds: dict[str, list[int]] = {}
    for record in records.values():
        kinds.setdefault(stored_as(record), []).append(record["bytes"])
    dense = sum(len(sizes) for kind, sizes in kinds.items() if kind.startswith("dense: "))
    return Section(
        name="tensors",
        title="How tensors are stored",
        paper="",
        finding=f"{len(records)} tensors, {dense} of them dense.",
        tables=(
            Table(
                "schemes",
                "One row per scheme, and per reason for staying dense.",
                ("stored as", "tensors", "size"),
                tuple((kind, len(sizes), human_bytes(sum(sizes))) for kind, sizes in kinds.items()),
            ),
        ),
    )
