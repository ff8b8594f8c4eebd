"""A training run as a section of the checkpoint's page: its losses, and which blocks were chosen, by layer and by kind.

The paper's Figure 4 shows in which layers the chosen blocks lie, its Figure 5 in which projections; here both are of
this model (Sparse Matrix Tuning, arXiv:2405.15525). The section is added to `swquant/report.html`, under what the page
says of rounding and of earlier runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from swquant.checkpoints.schema import TuningRecord
from swquant.drawing.charts import draw
from swquant.drawing.page import appended, page, section_html
from swquant.drawing.section import Bars, Chart, Interval, Section, Series, Table

__all__ = ["tuning_page", "tuning_section"]

_LAYER = re.compile(r"\.(\d+)\.")
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_VALUES = re.compile(r"(^|[._])v(_proj|alue)?$")


def tuning_page(old: str | None, name: str, of_set: str, record: TuningRecord, blocks: Mapping[str, int]) -> str:
    """The page with the run in it. old: the checkpoint's page, None where it has none. name: of the checkpoint, blocks:
    stored name -> how many of the set."""
    section = tuning_section(of_set, record, blocks)
    html = section_html(section, {chart.name: draw(chart) for chart in section.charts})
    whole = appended(old, html) if old is not None else None
    return whole if whole is not None else page(f"{name}, tuned", (), [html])


def tuning_section(of_set: str, record: TuningRecord, blocks: Mapping[str, int]) -> Section:
    """What came of a run. blocks: stored name -> how many of the set."""
    before, after = record["held_out_before"], record["held_out_after"]
    trained = [f"{record['blocks']:,} blocks"] if record["blocks"] else []
    trained += [f"{record['scales']:,} scales and offsets"] if record.get("scales") else []
    finding = (
        f"{' and '.join(trained)} were trained in {len(record['losses'])} steps on {record['data']}; the loss on held-out text "
        f"went from {before:.4g} to {after:.4g} nats per token."
    )
    charts: list[Chart | Bars] = [_losses(of_set, record)]
    tables: tuple[Table, ...] = ()
    agrees, paper = None, ""
    if blocks:
        kinds = _kinds(blocks)
        first = kinds.most_common(1)[0][0]
        agrees = bool(_VALUES.search(first))
        paper = "most chosen blocks lie in attention, and there in V."
        share = sum(count for name, count in blocks.items() if _ATTENTION.search(name)) / kinds.total()
        finding += f" {share:.0%} of the blocks lie in attention; the kind with most is {first} ({kinds[first] / kinds.total():.0%})."
        charts += [_by_layer(of_set, blocks), _by_kind(of_set, kinds)]
        rows = tuple((kind, count, f"{count / kinds.total():.1%}") for kind, count in kinds.most_common())
        tables = (Table(f"{of_set}-kinds", "Chosen blocks by kind of layer.", ("kind", "blocks", "share"), rows),)
    title = f"What was trained: {of_set}"
    return Section(f"tuned-{of_set}", title, paper, finding, agrees, tuple(charts), tables)


def _kinds(blocks: Mapping[str, int]) -> Counter[str]:
    """Kind of layer -> blocks."""
    kinds: Counter[str] = Counter()
    for name, count in blocks.items():
        kinds[name.removesuffix(".weight").rpartition(".")[2]] += count
    return kinds


def _losses(of_set: str, record: TuningRecord) -> Chart:
    losses = record["losses"]
    steps = tuple(float(step) for step in range(1, len(losses) + 1))
    ends = (0.0, float(len(losses)))
    return Chart(
        name=f"{of_set}-losses",
        title="Loss",
        alt="Loss of every step, and on held-out text before the first and after the last.",
        xlabel="step",
        ylabel="nats per token",
        series=(
            Series("of the step", steps, tuple(losses)),
            Series("held-out text", ends, (record["held_out_before"], record["held_out_after"])),
        ),
    )


def _by_layer(of_set: str, blocks: Mapping[str, int]) -> Chart:
    """The paper's Figure 4."""
    pools: dict[str, Counter[int]] = {"attention": Counter(), "MLP": Counter()}
    for name, count in blocks.items():
        if match := _LAYER.search(name):
            pools["attention" if _ATTENTION.search(name) else "MLP"][int(match[1])] += count
    layers = range(max((layer for counts in pools.values() for layer in counts), default=0) + 1)
    return Chart(
        name=f"{of_set}-layers",
        title="Chosen blocks by layer",
        alt="How many blocks were chosen in the attention and in the MLP of every layer.",
        xlabel="layer",
        ylabel="blocks",
        series=tuple(
            Series(pool, tuple(map(float, layers)), tuple(float(counts[layer]) for layer in layers))
            for pool, counts in pools.items()
        ),
    )


def _by_kind(of_set: str, kinds: Counter[str]) -> Bars:
    """The paper's Figure 5."""
    shares = [(kind, count / kinds.total()) for kind, count in kinds.most_common()]
    return Bars(
        name=f"{of_set}-kinds",
        title="Chosen blocks by kind of layer",
        alt="The share of the chosen blocks that lies in each kind of layer.",
        xlabel="share of the blocks",
        categories=tuple(kind for kind, _ in shares),
        labels=("share",),
        values=(tuple(Interval(share) for _, share in shares),),
    )
