"""What a person sees of rounded activations: which layers super activations pass through, and what is kept where."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console

from swquant.checkpoints.manifest import rounded
from swquant.checkpoints.schema import CheckpointManifest, InputsRecord
from swquant.terminal.detection import token_name
from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked
from swquant.units import thousands

__all__ = ["show_activations"]


def _layer_and_kind(name: str) -> tuple[int, str]:
    """model.layers.11.mlp.down_proj.weight -> (11, "mlp.down_proj")."""
    match = re.search(r"\.(\d+)\.(.+)\.weight$", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _ranges(numbers: Iterable[int]) -> str:
    """3, 4, 5, 9 -> "3-5, 9"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _passes(channel: int, inputs: Mapping[str, InputsRecord]) -> str:
    """The layers that read a channel of the residual stream through a norm and keep it: "q_proj, k_proj 12-28"."""
    layers: dict[str, list[int]] = {}
    for name, record in inputs.items():
        if record["norm"] is not None and channel in record["channels"]:
            layer, kind = _layer_and_kind(name)
            layers.setdefault(kind.rpartition(".")[2], []).append(layer)
    kinds: dict[str, list[str]] = {}
    for kind, where in layers.items():
        kinds.setdefault(_ranges(where), []).append(kind)
    return (
        "; ".join(f"{marked(', '.join(names))} {where}" for where, names in kinds.items())
        or "nowhere: the norms tame it"
    )


def show_activations(console: Console, manifest: CheckpointManifest) -> None:
    """For a checkpoint whose activations are rounded; prints nothing for others."""
    scheme = manifest["activations"]
    if scheme is None:
        return
    inputs = {name: record["inputs"] for name, record in rounded(manifest["tensors"]).items() if "inputs" in record}
    detection = manifest["detection"]
    if detection["super_activations"]:
        table = make_table(
            "Super activations",
            ("channel", "right"),
            ("token", "left"),
            ("largest", "right"),
            ("born in", "right"),
            ("dies in", "right"),
            ("kept in the inputs of layers", "left"),
        )
        for item in detection["super_activations"]:
            gone = "never" if item["gone"] is None else f"layer {item['gone']}"
            table.add_row(
                str(item["channel"]),
                token_name(detection, item["token"]),
                thousands(item["value"]),
                f"layer {item['born']}",
                gone,
                _passes(item["channel"], inputs),
            )
        show_table(console, table)
    kinds: dict[str, list[InputsRecord]] = {}
    for name, record in inputs.items():
        kinds.setdefault(_layer_and_kind(name)[1], []).append(record)
    table = make_table(
        f"Activations rounded to {scheme['dtype']}, {scheme['scale']}, {scheme['range']}",
        ("inputs of", "left"),
        ("layers", "right"),
        ("with kept\nchannels", "right"),
        ("largest to\nmedian", "right"),
        ("channels kept (in so many layers)", "left"),
    )
    for kind, records in kinds.items():
        counts = Counter(channel for record in records for channel in record["channels"])
        often = ", ".join(f"{channel} ({count})" for channel, count in counts.most_common(4))
        ratios = [max(record["peaks"]) / record["median"] for record in records if record["peaks"] and record["median"]]
        table.add_row(
            marked(kind),
            str(len(records)),
            str(sum(bool(record["channels"]) for record in records)),
            f"{max(ratios):,.0f}" if ratios else "",
            often + (" …" if len(counts) > 4 else ""),
        )
    show_table(console, table)
