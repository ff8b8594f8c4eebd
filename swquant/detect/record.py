"""A detection as JSON can hold it: the same for `detect --json`, the manifest, and the tables that people see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swquant.checkpoints.detection_schema import DetectionRecord
from swquant.units import short

if TYPE_CHECKING:
    from swquant.detect.found import Found

__all__ = ["detection_record"]


def detection_record(found: Found) -> DetectionRecord:
    """What was detected, as JSON: the same for `detect --json` and the manifest."""
    detection = found.detection
    record: DetectionRecord = {
        "prompt": found.prompt,
        "token_ids": list(found.token_ids),
        "tokens": list(found.tokens),
        "rounds": detection.rounds,
        "super_weights": [_rounded(asdict(item)) for item in detection.super_weights],
        "cancellers": [_rounded(asdict(item)) for item in detection.cancellers],
        "super_activations": [_rounded(asdict(item)) for item in detection.super_activations],
        "layers": [_rounded(asdict(item)) for item in detection.layers],
        "published": [
            {"model": entry.model, "coordinates": [list(point) for point in entry.coordinates]}
            for entry in found.published
        ],
    }
    if found.unseen:
        record["unseen"] = list(found.unseen)
    if found.unseen_layers:
        record["unseen_layers"] = list(found.unseen_layers)
    return record


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: more would be noise of float32."""
    if isinstance(value, float):
        return short(value)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
