"""A plan that stock transformers can load: rehearsed before anything is written, and mended until it fits.

What a packed layer lacks and the model's own code touches stays dense, with that reason; so does what transformers
builds under a name that it does not find. No module holds a packed embedding: a model with one is decoded while it is
loaded, or, where not all weights share a scheme, stock transformers stops at it with an error, which is said before.
What is left after that is refused: a checkpoint that loads with random weights is worse than none. And one of which
little is packed is not what somebody wants who asked for 4 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.compress.choice import Decoded
from swquant.compress.config import checkpoint_config
from swquant.compress.plan import Plan, SchemesError, TooFewCodesError
from swquant.models.architecture import Architecture
from swquant.models.rehearsal import Rehearsal, rehearse

__all__ = ["rehearsed_plan"]

# Every round leaves one more kind of module dense; no model has so many.
_ROUNDS = 12
_OTHERS = "serve the original, or take a tool with a format of its own, such as llama.cpp"


class Planner(Protocol):
    """The plan for an architecture; decoded: see `Plan`. tables: whether embedding and output head are rounded, where
    the options say so."""

    def __call__(
        self, architecture: Architecture, *, decoded: Decoded = Decoded.NOTHING, tables: bool = True
    ) -> Plan: ...


def rehearsed_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan_with: Planner,
    *,
    offsets: str = "none",
    stock: bool = True,
    kept: bool = True,
) -> Plan:
    """The plan, with whatever must stay dense for stock transformers; codes in its modules if they can hold them,
    decoded while loading where they cannot, or not the zero points, and with float offsets, which no module holds.
    With offsets of a byte, which go into an ONNX file, and where it is not for stock transformers, there is nothing to
    rehearse. kept: see `prepare`. Raises SwquantError where neither packs half of the linear weights."""
    if offsets == "byte" or not stock:
        plan = plan_with(architecture)
        _check_share(checkpoint, plan, architecture)
        return plan
    if offsets == "float":
        return _rehearsed(checkpoint, architecture, plan_with, Decoded.CODES, kept=kept)
    try:
        return _rehearsed(checkpoint, architecture, plan_with, Decoded.NOTHING, kept=kept)
    except TooFewCodesError:
        try:
            return _rehearsed(checkpoint, architecture, plan_with, Decoded.CODES, kept=kept)
        except SwquantError as error:  # what kept the codes out of the modules is the reason to tell
            if isinstance(error, SchemesError) and error.of_tables:
                raise
        raise


def _rehearsed(
    checkpoint: Checkpoint, architecture: Architecture, plan_with: Planner, decoded: Decoded, *, kept: bool
) -> Plan:
    whole, unread = architecture, ""
    for _ in range(_ROUNDS):
        plan = plan_with(architecture, decoded=decoded, tables=not unread)
        layout = {name: form for tensor in plan.tensors for name, form in tensor.layout.items()}
        rehearsal = rehearse(checkpoint, checkpoint_config(checkpoint, plan, architecture), layout)
        if not kept:
            rehearsal = replace(rehearsal, zero_points=())
        if not rehearsal.problem:
            _check_share(checkpoint, plan, whole)
            return _with_tables(plan_with(architecture, decoded=decoded), unread) if unread else plan
        dense = _to_leave_dense(rehearsal, plan, architecture)
        if dense:
            architecture = architecture.without(dense)
        elif plan.tables and not decoded:
            decoded, unread = _for_tables(plan_with, architecture)
            if unread and not rehearsal.error:  # it would load it, with random weights
                break
        elif rehearsal.zero_points and not decoded:
            decoded = Decoded.ZERO_POINTS
        else:
            break
    raise TooFewCodesError(
        f"{checkpoint.name}: stock transformers could not load what would be written ({rehearsal.problem}); "
        f"{_remedies(plan)}"
    )


def _for_tables(plan_with: Planner, architecture: Architecture) -> tuple[Decoded, str]:
    """How a model is loaded whose modules do not hold a table: decoded, or else why stock transformers refuses it."""
    try:
        return plan_with(architecture, decoded=Decoded.EMBEDDING).decoded, ""
    except SchemesError as error:
        one, other, *_ = error.schemes
        reason = "its modules hold no packed embedding, and it decodes only weights that share one scheme"
        return Decoded.NOTHING, f"{reason}, not {one} and {other}"


def _with_tables(plan: Plan, unread: str) -> Plan:
    """A plan that stock transformers would load but for the embedding; then it stops, at a weight that is not there."""
    note = f"stock transformers refuses to load it ({unread}); swquant.load and import swquant.hf read it"
    return replace(plan, unread=unread, notes=(*plan.notes, note))


def _to_leave_dense(rehearsal: Rehearsal, plan: Plan, architecture: Architecture) -> Mapping[str, str]:
    """Stored name -> why it has to stay dense, nothing where that would not help."""
    built = {name: architecture.targets.get(name, "").removesuffix(".weight") for name in architecture.weights}
    packed = {tensor.name for tensor in plan.quantized}
    if rehearsal.lacking:
        pattern = re.compile(re.sub(r"\d+", r"\\d+", re.escape(rehearsal.lacking)))
        reason = "the model's own code sets this weight up, which a packed layer lacks"
        return {name: reason for name, module in built.items() if name in packed and pattern.fullmatch(module)}
    missing = {name.removesuffix(".weight") for name in rehearsal.missing}
    reason = "transformers does not find it under its stored name"
    return {name: reason for name, module in built.items() if name in packed and module in missing}


def _check_share(checkpoint: Checkpoint, plan: Plan, architecture: Architecture) -> None:
    """Raise SwquantError where less than half of the linear weights of the decoder layers would be packed."""
    decoder = {*architecture.weights, *architecture.lost}
    sizes = {tensor.name: tensor.source.numel for tensor in plan.tensors if tensor.name in decoder}
    packed = sum(tensor.source.numel for tensor in plan.linear)
    if 2 * packed >= sum(sizes.values()) or plan.options.allow_dense:
        return
    reasons: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.name in decoder and tensor.block is None:
            reasons[tensor.reason] = reasons.get(tensor.reason, 0) + tensor.source.numel
    reason = max(reasons, key=reasons.__getitem__)
    raise TooFewCodesError(
        f"{checkpoint.name}: only {packed / sum(sizes.values()):.0%} of the linear weights would be packed ({reason}); "
        f"{_remedies(plan)}, or add --allow-dense"
    )


def _remedies(plan: Plan) -> str:
    """Without zero points blocks need not be alike, and weights stay in the modules."""
    return f"use --symmetric, {_OTHERS}" if plan.decoded is Decoded.ZERO_POINTS else _OTHERS
