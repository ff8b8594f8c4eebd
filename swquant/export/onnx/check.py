"""The check after an export: the file is run on ONNX Runtime and compared with the torch model it was made from.

Compared are the logits of the prompt at once, and then of every token that the torch model continues it with, one at a
time through the cache; and what the restored outliers change. Where the arithmetic changes with the length of a text
(`lengths`), so are those of a longer sequence, past each change at once and one token at a time. A file that differs by
more than its arithmetic explains is not written under its final name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import PreTrainedModel

from calibrationless import CPU
from exporters.errors import SwquantError
from exporters.onnx.files import MODEL
from swquant.checkpoints.onnx_schema import CheckRecord
from swquant.export.onnx.lengths import BEHIND, changes_of, length_past, pieces_of, reached
from swquant.export.onnx.options import ExportOptions
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import library_path, open_session
from swquant.scratch import temporary_folder
from swquant.units import short

__all__ = ["LongReference", "Reference", "check_export", "make_long_reference", "make_reference"]

_NEW_TOKENS = 16
_TAIL = 2 * BEHIND  # tokens at the end of the longer sequence whose logits are compared when it is run at once
# Largest difference of two logits, as a share of the range of all logits, by (precision, accuracy level).
_TOLERANCE = {("fp32", 0): 1e-4, ("fp16", 0): 0.02, ("fp32", 4): 0.15, ("fp16", 4): 0.15}


@dataclass(frozen=True)
class Reference:
    """What the torch model says. prompt: token ids. chosen: what it continues them with. prompt_logits [1, prompt,
    vocabulary]; next_logits [1, vocabulary] for each of chosen but the last. long: None where the length of a text
    changes nothing."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    prompt_logits: np.ndarray
    next_logits: tuple[np.ndarray, ...]
    long: LongReference | None = None


def make_reference(model: PreTrainedModel, prompt: tuple[int, ...]) -> Reference:
    """Run the torch model on a prompt and let it continue greedily."""
    chosen: list[int] = []
    logits: list[np.ndarray] = []
    ids, past = torch.tensor([prompt], device=model.device), None
    with torch.no_grad():
        while len(chosen) < _NEW_TOKENS:
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
            logits.append(output.logits.to(CPU, torch.float32).numpy())
            chosen.append(int(logits[-1][0, -1].argmax()))
            ids, past = torch.tensor([chosen[-1:]], device=model.device), output.past_key_values
    return Reference(prompt, tuple(chosen), logits[0], tuple(item[:, -1] for item in logits[1:]))


@dataclass(frozen=True)
class LongReference:
    """What the torch model says of a sequence that goes past the lengths at which its arithmetic changes.

    ids: int64 [1, length], of length 0 where none of them can be afforded. pieces: of it, as they go through the cache.
    whole [tail, vocabulary]: logits of its last tokens, run at once. stepped [pieces, vocabulary]: of every piece's
    last token. unreached: lengths of changes behind it.
    """

    ids: np.ndarray
    pieces: tuple[slice, ...]
    whole: np.ndarray
    stepped: np.ndarray
    unreached: tuple[int, ...]


def make_long_reference(model: PreTrainedModel) -> LongReference | None:
    """Run the torch model past the lengths at which its arithmetic changes; None where there are none."""
    changes = changes_of(model.config)
    if not changes:
        return None
    text, within = model.config.get_text_config(), reached(model, changes)
    unreached, empty = changes[len(within) :], np.zeros((0, text.vocab_size), np.float32)
    if not within:
        return LongReference(np.zeros((1, 0), np.int64), (), empty, empty, unreached)
    ids = np.random.RandomState(0).randint(0, text.vocab_size, (1, length_past(model.config, within))).astype(np.int64)
    pieces = tuple(pieces_of(within, ids.shape[1]))
    stepped, past, tokens = [], None, torch.from_numpy(ids).to(model.device)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits[0, -_TAIL:].to(CPU, torch.float32).numpy().copy()
        for piece in pieces:
            output = model(input_ids=tokens[:, piece], past_key_values=past, use_cache=True)
            stepped.append(output.logits[0, -1].to(CPU, torch.float32).numpy().copy())
            past = output.past_key_values
    return LongReference(ids, pieces, whole, np.stack(stepped), unreached)


def _long_difference(model: OnnxModel, reference: LongReference) -> float:
    """The largest difference of the logits as a share of their range."""
    logits, _ = model.step(reference.ids, model.empty_past(1))
    found, past = [logits[0, -_TAIL:].astype(np.float32)], model.empty_past(1)
    for piece in reference.pieces:
        logits, past = model.step(reference.ids[:, piece], past)
        found.append(logits[0, -1:].astype(np.float32))
    ours, theirs = np.concatenate(found), np.concatenate([reference.whole, reference.stepped])
    return float(np.abs(ours - theirs).max() / np.ptp(theirs)) if np.isfinite(ours).all() else float("inf")


def _differences(model: OnnxModel, reference: Reference) -> tuple[float, int]:
    """(largest difference of the logits as a share of their range, tokens on which both agree)."""
    logits, past = model.step(np.array([reference.prompt]), model.empty_past(1))
    if not np.isfinite(logits).all():
        return float("inf"), 0
    pairs = [(logits.astype(np.float32), reference.prompt_logits)]
    same = int(logits[0, -1].argmax()) == reference.chosen[0]
    agreed = int(same)
    for token, expected, following in zip(reference.chosen, reference.next_logits, reference.chosen[1:], strict=False):
        logits, past = model.step(np.array([[token]]), past)
        if not np.isfinite(logits).all():
            return float("inf"), agreed
        pairs.append((logits[:, -1].astype(np.float32), expected))
        agreed += int(logits[0, -1].argmax()) == following
    span = max(float(np.ptp(expected)) for _, expected in pairs)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs) / span, agreed


def _without_outliers(folder: Path, deltas: Mapping[str, np.ndarray], config: Any, reference: Reference) -> float:
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array)) for array in deltas.values()]
    for name, value in zip(deltas, values, strict=True):
        options.add_initializer(name, value)
    session = open_session(folder / MODEL, options, library=False)
    difference, _ = _differences(OnnxModel(session, config), reference)
    return difference


def _providers(folder: Path, config: Any, reference: Reference) -> dict[str, int]:
    """Provider -> nodes that ran on it, from a profile of one run."""
    with temporary_folder("profile") as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / "run")
        session = open_session(folder / MODEL, options)
        model = OnnxModel(session, config)
        model.step(np.array([reference.prompt]), model.empty_past(1))
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return dict(sorted(Counter(provider for _, provider in nodes).items()))


def _finite(difference: float) -> float | None:
    """JSON has no number for logits that overflow: without its outliers a float16 model may be no model at all."""
    return short(difference, 3) if np.isfinite(difference) else None


def _tolerance(options: ExportOptions) -> float:
    return _TOLERANCE[options.precision, options.accuracy_level or 0]


def _judge(difference: float, options: ExportOptions, where: str) -> None:
    if not difference <= _tolerance(options):
        raise SwquantError(
            f"the exported model differs from the checkpoint {where}by {difference:.2g} of the range of its logits; "
            f"{_tolerance(options):g} is what {options.precision} at accuracy level {options.accuracy_level} explains; "
            "nothing was written"
        )


def check_export(
    folder: Path, deltas: Mapping[str, np.ndarray], config: Any, reference: Reference, options: ExportOptions
) -> CheckRecord:
    """Compare the model in `folder` with the reference. Raises SwquantError where it is another model.

    deltas: the initializers that hold outliers. Returns the record for the manifest.
    """
    difference, agreed = _differences(OnnxModel(open_session(folder / MODEL, library=False), config), reference)
    with_library = None
    if library_path() is not None and deltas:  # the file means the same to both, so the worse of the two decides
        with_library, also = _differences(OnnxModel(open_session(folder / MODEL), config), reference)
        difference, agreed = max(difference, with_library), min(agreed, also)
    _judge(difference, options, "")
    long = reference.long
    if long is not None and long.pieces:  # attention is the same to both, so one is enough; the library is faster
        further = _long_difference(OnnxModel(open_session(folder / MODEL), config), long)
        _judge(further, options, f"on {long.ids.shape[1]} tokens, a length at which its arithmetic changes, ")
        difference = max(difference, further)
    record: CheckRecord = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "prompt_tokens": len(reference.prompt),
        "generated_tokens": len(reference.chosen),
        "same_tokens": agreed,
        "operator_library": with_library is not None,
        "largest_difference": short(difference, 3),
        "tolerance": _tolerance(options),
        "without_outliers": _finite(_without_outliers(folder, deltas, config, reference)) if deltas else None,
        "providers": _providers(folder, config, reference),
    }
    if long is not None and long.pieces:
        record["long_tokens"] = long.ids.shape[1]
    if long is not None and long.unreached:
        record["unreached"] = list(long.unreached)
    return record
