"""What the manifest says of a tuning, and what `--json` says of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from calibrationless import Blocks
from swquant.checkpoints.schema import SourceRecord, TuningRecord
from swquant.tune.plan import TunePlan, nbytes_of
from swquant.units import short

__all__ = ["plan_record", "tuning_record"]


def plan_record(plan: TunePlan) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "checkpoint": plan.checkpoint.name,
        "against": None if plan.against is None else plan.against.name,
        "data": plan.data,
        "options": plan.options.as_dict(),
        "select": plan.select,
        "blocks": plan.count,
        "of_blocks": plan.of_blocks,
        "scales": sum(plan.scales.values()),
        "parameters": plan.count * plan.options.block**2 + sum(plan.scales.values()),
        "bytes": plan.nbytes,
        "more_bits_per_quantized_weight": short(plan.more_bits, 4),
        "tokens": plan.tokens,
        "memory": plan.memory,
        "candidates": dict(Counter(name.removesuffix(".weight").rpartition(".")[2] for name in plan.pool)),
        "left_out": dict(plan.left_out),
    }


def tuning_record(
    plan: TunePlan, blocks: Mapping[str, Blocks], facts: Mapping[str, Any], losses: list[float], after: float
) -> TuningRecord:
    """What the manifest says. facts: of the state of the run."""
    count = sum(map(len, blocks.values()))
    against: SourceRecord | None = None
    if plan.against is not None:
        against = {"name": plan.against.name, "kind": plan.against.kind, "fingerprint": plan.against.fingerprint}
    record: TuningRecord = {
        "base": plan.checkpoint.fingerprint,
        "against": against,
        "data": plan.data,
        "options": plan.options.as_dict(),
        "blocks": count,
        "bytes": nbytes_of(count, plan.options.block),
        "tokens": facts["tokens"],
        "rate": facts["rate"],
        "tried": {rate: None if loss is None else short(loss) for rate, loss in facts["tried"].items()},
        "held_out_before": short(facts["before"]),
        "held_out_after": short(after),
        "losses": [short(loss) for loss in losses],
    }
    if plan.scales:
        record["scales"] = sum(plan.scales.values())
    return record
