"""GGUF, from end to end: a plan, or a compressed checkpoint, becomes one file that llama.cpp and its kin load.

    architecture and vocabulary known? -> a place for every tensor -> header -> tensor by tensor -> read again -> rename

A plan goes straight from the original's weights to the type, searched in the type's own layout; nothing is rounded
twice. Of a checkpoint the codes are copied into the blocks that hold them as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import gguf
import torch
from torch import Tensor

from calibrationless import CPU, Evidence, one_thread_per_operation
from exporters.errors import SwquantError
from exporters.gguf.blocks import TYPES
from exporters.gguf.names import Place, places
from exporters.gguf.write import Form, write_file
from exporters.sidecar import SETS
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.compress.evidence import evidence_for, text_of
from swquant.compress.plan import TensorPlan
from swquant.compress.prepared import Prepared, in_order
from swquant.detect.own_text import SelfText
from swquant.export.gguf.file import check_file, whole_file
from swquant.export.gguf.header import Header
from swquant.export.gguf.imatrix import check_imatrix, write_imatrix
from swquant.export.gguf.options import GgufOptions
from swquant.export.gguf.suiting import chosen_type
from swquant.export.gguf.tensors import (
    Content,
    Item,
    arranged,
    content_of,
    fitted_tensor,
    form_of,
    from_checkpoint,
    from_plan,
    made,
    with_embedding,
)
from swquant.output.destination import check_space, writing
from swquant.progress import Progress, silent
from swquant.version import __version__

__all__ = ["Fitted", "GgufRecord", "Written", "export_gguf", "fitted", "write_gguf"]


class GgufRecord(TypedDict):
    """What a file is, for people and `--json`; the file has its own header. types: of tensors, and how many have each.
    super_weights: what the file holds of each beside the true value. left_out: what a checkpoint has that GGUF cannot
    hold. sha256: of the data of all tensors."""

    kind: Literal["gguf"]
    swquant: str
    source: str
    architecture: str
    types: dict[str, int]
    tensors: dict[str, str]
    super_weights: list[dict[str, Any]]
    left_out: list[str]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """A finished file and what is in it."""

    path: Path
    manifest: GgufRecord


@dataclass(frozen=True)
class Fitted(Prepared):
    """A plan with the types of a GGUF file, and what was made to see that the model fits. heads: stored names of
    embedding and output head, where they are rounded."""

    header: Header = field(kw_only=True)
    placed: tuple[Place, ...] = field(kw_only=True)
    heads: frozenset[str] = field(kw_only=True)


def fitted(prepared: Prepared, options: GgufOptions) -> Fitted:
    """The plan with the types of a GGUF file. Raises SwquantError for a model that it cannot hold, before any work."""
    header = Header(prepared.checkpoint, options.tokenizer)
    if options.imatrix is not None:
        check_imatrix(options.imatrix)
    placed = _places(header, [tensor.name for tensor in prepared.plan.tensors])
    header.check()
    kind = TYPES[chosen_type(prepared.plan.options, options)]
    floats = {name for place in placed if place.float32 for name in place.sources}
    heads = _embeddings(placed) if options.embedding_type != "stored" else frozenset()
    tensors, notes = [], dict.fromkeys(prepared.plan.notes)
    for tensor in prepared.plan.tensors:
        if tensor.name in heads:
            tensor, note = with_embedding(tensor, options.embedding_type), None
        else:
            tensor, note = fitted_tensor(tensor, kind)
        if tensor.name in floats or (tensor.recipe is None and len(tensor.source.shape) == 1):
            tensor = replace(tensor, layout={tensor.name: (torch.float32, tensor.source.shape)})
        tensors.append(tensor)
        if note is not None:
            notes[note] = None
    plan = replace(prepared.plan, tensors=tuple(tensors), shards=(tuple(tensors),), notes=tuple(notes))
    known = {item.name: getattr(prepared, item.name) for item in fields(Prepared)}
    return Fitted(**{**known, "plan": plan}, header=header, placed=placed, heads=heads)


def write_gguf(
    prepared: Fitted, out: Path, options: GgufOptions, *, overwrite: bool = False, progress: Progress = silent
) -> Written:
    """Carry out a plan. `out` appears whole or not at all. Raises SwquantError."""
    plan, placed = prepared.plan, prepared.placed
    check_file(out, overwrite, prepared.checkpoint)
    if options.imatrix is not None:
        write_imatrix(Path(options.imatrix), prepared, placed)
    record = {"compress": plan.options.as_dict(), "gguf": options.as_dict(), "device": prepared.device.type}
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    items = {item.name: item for item in from_plan(plan.tensors)}

    def contents(text: SelfText | None) -> Generator[Content]:
        tensors = [by_name[name] for place in placed for name in place.sources]
        known = partial(_evidence, prepared, text)
        with progress.bytes("Rounding", sum(tensor.source.nbytes for tensor in tensors)) as bar:
            for _, content in in_order(prepared, tensors, made, known, bar):
                yield content

    with (
        one_thread_per_operation(),
        text_of(prepared, progress) as text,
        closing(contents(text)) as stream,
    ):
        return _write(prepared.header, placed, items, stream, out, record, overwrite)


def _evidence(prepared: Fitted, text: SelfText | None, tensor: TensorPlan) -> Evidence:
    refinement = prepared.plan.options.refinement
    if tensor.name in prepared.heads:  # read row by row, or by the last norm: no input of it was looked at
        return Evidence(importance=None if refinement == "none" else torch.ones(tensor.shape[1]))
    return evidence_for(tensor, prepared.found, refinement, text)


def export_gguf(
    checkpoint: CompressedCheckpoint,
    out: Path,
    options: GgufOptions,
    *,
    overwrite: bool = False,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Written:
    """Export a checkpoint opened with unrounded=True. `out` appears whole or not at all. device: where weights are
    rounded again. Raises SwquantError."""
    if options.imatrix is not None:
        raise SwquantError(
            "--imatrix: a checkpoint has no energies; give it to swquant compress, with the original model"
        )
    check_file(out, overwrite, checkpoint)
    if trained := next((name for name in checkpoint.sets if name not in SETS), None):  # without it, another model
        raise SwquantError(
            f"{checkpoint.name}: a GGUF file holds codes alone, without its set {trained}; swquant merge bakes them into "
            "the codes"
        )
    header = Header(checkpoint, options.tokenizer)
    placed = _places(header, checkpoint.tensors)
    header.check()
    kept = options.embedding_type == "stored"
    heads = dict.fromkeys(_embeddings(placed), None if kept else options.embedding_type)
    with progress.step("Looking for the type of every tensor"):
        items = {item.name: item for item in from_checkpoint(checkpoint, options.type, heads)}
    record = {"checkpoint": checkpoint.manifest["digest"], "gguf": options.as_dict(), "device": device.type}

    def contents() -> Generator[Content]:
        names = [name for place in placed for name in place.sources]
        with progress.bytes("Writing", sum(checkpoint.tensors[name].nbytes for name in names)) as bar:
            for name in names:
                bar.advance(name, checkpoint.tensors[name].nbytes)
                yield content_of(checkpoint, items[name], device)

    with closing(contents()) as stream:
        return _write(header, placed, items, stream, out, record, overwrite, _left_out(checkpoint, items))


def _places(header: Header, names: Iterable[str]) -> tuple[Place, ...]:
    return places(header.checkpoint.name, names, header.architecture, header.config)


def _embeddings(placed: Iterable[Place]) -> frozenset[str]:
    """Stored names of embedding and output head."""
    return frozenset(
        name for place in placed if place.name in ("token_embd.weight", "output.weight") for name in place.sources
    )


def _left_out(checkpoint: CompressedCheckpoint, items: Mapping[str, Item]) -> list[str]:
    """What a checkpoint has and a GGUF file of its codes has not."""
    kept = 0
    for name in checkpoint.quantized_names:
        if items[name].recipe is None:
            kept += sum(len(patch) for patch in checkpoint.patches(name))
    lost = [f"{kept} outliers that the sidecar keeps exactly: their codes stand for them"] if kept else []
    if checkpoint.manifest["activations"] is not None:
        lost.append("rounded activations: llama.cpp rounds inputs in its own way")
    return lost


def _write(
    header: Header,
    placed: tuple[Place, ...],
    items: Mapping[str, Item],
    contents: Iterator[Content],
    out: Path,
    options: Mapping[str, Any],
    overwrite: bool,
    left_out: Iterable[str] = (),
) -> Written:
    """The file. contents: of the sources of all places, in their order."""
    derived = header.architecture.derived(header.config)
    forms = [Form(name, "F32", tuple(values.shape)) for name, values in derived.items()]
    forms += [form_of(place, items) for place in placed]
    size, held = sum(form.nbytes for form in forms), {}
    types = Counter(form.type for form in forms)
    check_space(out, size)

    def data() -> Iterator[Tensor]:
        yield from derived.values()
        for place, form in zip(placed, forms[len(derived) :], strict=True):
            parts = [next(contents) for _ in place.sources]
            held[form.name] = [code for part in parts for code in part.super_weights]
            yield arranged(place, form, [part.data for part in parts])
            del parts  # before the next ones are made

    with writing(out, size), whole_file(out, overwrite) as partial:
        digest = write_file(
            partial,
            header.architecture.name,
            forms,
            lambda writer: header.write(writer, _file_type(types), options),
            data(),
        )
        written = partial.stat().st_size
    weights = [{"tensor": name, **asdict(code)} for name, codes in held.items() for code in codes]
    record: GgufRecord = {
        "kind": "gguf",
        "swquant": __version__,
        "source": header.checkpoint.name,
        "architecture": header.architecture.name,
        "types": dict(sorted(types.items())),
        "tensors": {form.name: form.type for form in forms},
        "super_weights": weights,
        "left_out": [*left_out, *header.architecture.unheld(header.config)],
        "bytes": written,
        "sha256": digest,
    }
    return Written(out, record)


def _file_type(types: Mapping[str, int]) -> int:
    """llama_ftype of the type that most rounded tensors have."""
    rounded = {name: count for name, count in types.items() if name in TYPES}
    if rounded:
        return TYPES[max(rounded, key=rounded.__getitem__)].file_type
    return int(gguf.LlamaFileType.MOSTLY_F16 if "F16" in types else gguf.LlamaFileType.ALL_F32)
