"""The writer: takes rounded tensors in the order of the plan, and writes shards, sidecar and all other files.

It is the only one that writes, so the bytes cannot depend on where the tensors were rounded. What it has written it
says in a journal (`resuming`), and where there is one already, it goes on from there.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from exporters.json_file import write_json
from exporters.safetensors_file import FileRecord
from swquant.checkpoints.manifest import write_manifest
from swquant.checkpoints.schema import CheckpointContent, CheckpointManifest, TensorRecord
from swquant.compress.config import checkpoint_config
from swquant.compress.evidence import evidence_for, text_of
from swquant.compress.loaders import loader_table
from swquant.compress.prepared import Prepared, in_order
from swquant.compress.records import activations_record, measured_record, tensor_record
from swquant.compress.report import REPORT, checkpoint_report
from swquant.compress.resuming import Steps
from swquant.compress.tensor import round_tensor
from swquant.compress.weights import WeightFiles
from swquant.detect.record import detection_record
from swquant.output.card import write_card
from swquant.output.contents import remove_all_but
from swquant.output.journal import Journal
from swquant.output.verification import file_table
from swquant.progress import Progress
from swquant.version import __version__

__all__ = ["write_all"]


def write_all(prepared: Prepared, journal: Journal, folder: Path, progress: Progress) -> CheckpointManifest:
    """Everything that belongs into OUT, from where the journal of an interrupted run ends. Returns the manifest."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    (folder / "swquant").mkdir(parents=True, exist_ok=True)
    records, written = _write_weights(prepared, journal, folder, progress)
    checkpoint.save_companions(folder)
    write_json(folder / "config.json", checkpoint_config(checkpoint, plan, prepared.found.architecture), constants=True)
    page = checkpoint_report(checkpoint.name, prepared.found, plan, records)
    (folder / REPORT).write_text(page, encoding="utf-8")
    content: CheckpointContent = {
        "swquant": __version__,
        "source": {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
        "options": plan.options.as_dict(),
        "fingerprint": plan.options.fingerprint(checkpoint.fingerprint),
        "device": prepared.device.type,
        "detection": detection_record(prepared.found),
        "activations": activations_record(plan.options, declared=plan.int8_inputs),
        "loaders": loader_table(plan),
        "totals": {
            "bits_per_quantized_weight": round(plan.bits_per_weight, 4),
            "quantized_weights": sum(tensor.source.numel for tensor in plan.quantized),
            "weights": sum(tensor.source.numel for tensor in plan.tensors),
            "bytes": 0,
            "source_bytes": plan.source_bytes,
        },
        "notes": list(plan.notes),
        "left_out": dict(plan.left_out),
        "tensors": records,
        "files": {},
    }
    write_card(folder, checkpoint, content)
    content["files"] = file_table(folder, written)
    content["totals"]["bytes"] = sum(entry["bytes"] for entry in content["files"].values())
    return write_manifest(folder, content)


def _write_weights(
    prepared: Prepared, journal: Journal, folder: Path, progress: Progress
) -> tuple[dict[str, TensorRecord], dict[str, FileRecord]]:
    """The shards, their index and the sidecar, the only files that weights are written to. Returns the tensors' records
    and the files'."""
    plan, found = prepared.plan, prepared.found
    with ExitStack() as stack:
        files = stack.enter_context(closing(WeightFiles(folder, plan, begun=bool(journal.entries))))
        remove_all_but(files.names, folder)
        steps = Steps(journal, files)
        stack.enter_context(steps.saved())
        if steps.taken_up:
            progress.note(f"Going on: {steps.taken_up} of {len(plan.tensors)} tensors were there")
        before, rest = plan.tensors[: steps.taken_up], plan.tensors[steps.taken_up :]
        text = None
        if rest:
            text = stack.enter_context(text_of(prepared, progress))
        bar = stack.enter_context(progress.bytes("Compressing", plan.source_bytes))
        bar.advance("", sum(tensor.source.nbytes for tensor in before))
        known = partial(evidence_for, found=found, refinement=plan.options.refinement, text=text)
        for tensor, rounded in in_order(prepared, rest, round_tensor, known, bar):
            digests = files.write(rounded)
            steps.add({**digests, "measured": measured_record(tensor, rounded, found, plan.options)}, tensor.nbytes)
            del rounded  # before the next one is made
        steps.save()
        written = files.finish()
    records = {
        tensor.name: tensor_record(tensor, plan, files.shards[tensor.name], step["sha256"], step["measured"])
        for tensor, step in zip(plan.tensors, steps.done, strict=True)
    }
    weight_map = {part: files.shards[tensor.name] for tensor in plan.tensors for part in tensor.layout}
    total = sum(tensor.nbytes for tensor in plan.tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return records, written
