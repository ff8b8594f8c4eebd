"""What a person sees of trained blocks: the plan, the result, and which blocks were chosen, by layer and by kind."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked, marked_sentence, rates_tried, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.checkpoints.schema import CheckpointManifest, PatchesManifest
    from swquant.tune.pipeline import Tuned
    from swquant.tune.plan import TunePlan

__all__ = ["show_blocks", "show_patches", "show_tune_plan", "show_tuned"]

_LAYER = re.compile(r"\.(\d+)\.")


def show_tune_plan(console: Console, plan: TunePlan) -> None:
    """What will be trained, on what, and what it takes."""
    options = plan.options
    goal = "the text itself" if plan.against is None else f"what {plan.against.name} predicts"
    of = "rounded weight" if plan.checkpoint.is_compressed else "weight of its linear layers"
    trained = []
    if plan.count:
        trained.append(
            f"{plan.count:,} of {plan.of_blocks:,} blocks of {options.block} x {options.block} on {plan.checkpoint.name}: "
            f"{human_bytes(plan.nbytes)}, {plan.more_bits:.3f} bits more per {of}"
        )
    if plan.scales:
        trained.append(
            f"{sum(plan.scales.values()):,} scales and offsets of {len(plan.scales)} weights of {plan.checkpoint.name}: "
            "not a byte more"
        )
    for line in trained:
        console.print(sentence(line), markup=False)
    chosen = f"Chosen by {plan.select} from {len(plan.pool)} weights ({options.from_}); " if plan.count else ""
    console.print(
        sentence(
            f"{chosen}{options.steps} steps on {plan.data}, {plan.tokens:,} tokens, towards {goal}; weights take "
            f"{human_bytes(plan.memory)} of memory"
        ),
        markup=False,
    )
    if plan.left_out:
        reasons = Counter(plan.left_out.values())
        for reason, count in reasons.items():
            console.print(sentence(f"{count} rounded weights are not trained: {reason}"), markup=False)


def show_tuned(console: Console, result: Tuned) -> None:
    """What came of it."""
    manifest, record = result.manifest, result.record
    if record["tried"]:
        console.print(rates_tried(record["tried"], record["rate"]))
    if manifest is not None:
        show_blocks(console, manifest)
    said = [f"{human_bytes(record['bytes'])} of blocks"] if record["blocks"] else []
    said += [f"{record['scales']:,} scales and offsets"] if record.get("scales") else []
    bits = ""
    if manifest is not None and "kind" not in manifest:
        bits = f"; {manifest['totals']['bits_per_quantized_weight']:.3f} bits per rounded weight"
    console.print(
        f"Held-out loss {record['held_out_before']:.4f} -> [bold]{record['held_out_after']:.4f}[/] with "
        f"{' and '.join(said)}{bits}"
    )
    if result.evaluation:
        table = make_table("On the text", ("", "left"), ("before", "right"), ("after", "right"))
        for key, (before, after) in result.evaluation.items():
            table.add_row(key, f"{before:.4f}", f"{after:.4f}")
        show_table(console, table)
    console.print(f"Written to [bold]{marked_sentence(str(result.path))}[/]", soft_wrap=True)
    if manifest is not None and "kind" in manifest:
        _show_next(console, result.path)


def show_patches(console: Console, path: Path, manifest: PatchesManifest) -> None:
    """`inspect` of patches alone: whose they are, how large, which blocks, what training did."""
    source = manifest["source"]
    console.print(
        f"[bold]{marked_sentence(str(path))}[/], patches made by swquant {marked(manifest['swquant'])} for "
        f"{marked(source['name'])} ({source['kind']}, fingerprint {marked(source['fingerprint'][:12])})",
        soft_wrap=True,
    )
    console.print(f"{human_bytes(manifest['totals']['bytes'])} on disk, over {len(manifest['tensors'])} of its tensors")
    show_blocks(console, manifest)
    for of_set, record in manifest["tuned"].items():
        options = record["options"]
        said = (
            f"{of_set}: {record['blocks']:,} blocks of {options['block']} x {options['block']}, {human_bytes(record['bytes'])}, "
            f"{options['steps']} steps on {record['data']}; held-out loss {record['held_out_before']:.4f} -> "
            f"{record['held_out_after']:.4f}"
        )
        console.print(sentence(said), markup=False, soft_wrap=True)
    _show_next(console, path)


def _show_next(console: Console, path: Path) -> None:
    """Of patches alone."""
    where = marked_sentence(shlex.quote(str(path)))
    console.print(f"Next: swquant merge {where} WHOLE --base MODEL writes the whole model", soft_wrap=True)


def show_blocks(console: Console, manifest: CheckpointManifest | PatchesManifest) -> None:
    """One row per set and kind of layer: how many blocks, and in which layers most."""
    for of_set in manifest.get("tuned", {}):
        kinds: dict[str, Counter[str]] = {}
        for name, record in manifest["tensors"].items():
            if count := record.get("blocks", {}).get(of_set, 0):
                layer = match[1] if (match := _LAYER.search(name)) else "-"
                kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], Counter())[layer] += count
        if not kinds:
            console.print(f"{marked(of_set)}: the scales were trained, no blocks")
            continue
        total = sum(layers.total() for layers in kinds.values())
        table = make_table(
            f"Blocks of the set {marked(of_set)}",
            ("layer", "left"),
            ("blocks", "right"),
            ("share", "right"),
            ("most in layers", "left"),
        )
        for kind, layers in sorted(kinds.items(), key=lambda item: -item[1].total()):
            most = ", ".join(f"{layer} ({count})" for layer, count in layers.most_common(4))
            table.add_row(marked(kind), str(layers.total()), f"{layers.total() / total:.0%}", most)
        show_table(console, table)
