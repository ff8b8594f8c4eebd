"""`compress`, from end to end: the only module that knows the order of things.

    open -> probe and detect -> plan, rehearsed -> per tensor: read, round, pack, write -> sidecar, config, report,
    manifest -> verify -> rename

Everything is written into a hidden folder beside OUT, verified there, and renamed as the last act. Whatever
happens before that, OUT does not exist (or, with overwrite, is still the old one), and the hidden folder holds what the
same command goes on from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from calibrationless import CPU, one_thread_per_operation
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.schema import CheckpointManifest
from swquant.cluster.workers import Team
from swquant.compress.budget import bits_within
from swquant.compress.choice import Decoded
from swquant.compress.options import CompressOptions
from swquant.compress.plan import Plan, make_plan
from swquant.compress.prepared import Prepared
from swquant.compress.rehearsal import rehearsed_plan
from swquant.compress.remote import check_workers
from swquant.compress.resuming import check_leftover, head_of
from swquant.compress.tables import tables_of, tied_copies
from swquant.compress.writing import write_all
from swquant.detect.found import Found
from swquant.detect.pipeline import find_super_weights
from swquant.detect.texts import other_writer
from swquant.models.architecture import Architecture, LinearKind
from swquant.models.converted import as_built
from swquant.models.devices import place_for
from swquant.output.contents import size_of
from swquant.output.destination import check_destination, check_space, replace, writing
from swquant.output.hidden import JOURNAL
from swquant.output.journal import Journal
from swquant.output.resumable import resumable
from swquant.output.verification import check_result
from swquant.progress import Progress, silent

__all__ = ["Compressed", "compress_checkpoint", "prepare", "write", "written"]


@dataclass(frozen=True)
class Compressed:
    """A finished checkpoint and its manifest."""

    path: Path
    manifest: CheckpointManifest


@one_thread_per_operation()
def prepare(
    checkpoint: Checkpoint,
    options: CompressOptions,
    *,
    low_memory: bool = False,
    stock: bool = True,
    kept: bool = True,
    device: torch.device = CPU,
    team: Team | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Probe and plan; writes nothing. stock: whether stock transformers is to load what comes of the plan. kept:
    whether a user is, and it is not on the way to another format, which zero points go into, too. device: where the
    model is run, if it fits there, and weights are rounded. team: who will round."""
    if checkpoint.is_compressed:
        raise SwquantError(f"{checkpoint.name}: already compressed; start from the original model")
    checkpoint = as_built(checkpoint)
    if options.text_from is not None:
        with other_writer(options.text_from, checkpoint):
            pass  # it can write: known before the work
    if team is not None:
        with progress.step("Asking the workers whether they see the model"):
            check_workers(team, checkpoint)
    place, said = place_for(checkpoint, torch.float32, device)
    with progress.step(f"Probing {checkpoint.name} with one prompt{said}"):
        found = find_super_weights(
            checkpoint, options.prompt, low_memory=low_memory, folds=options.refinement != "none", device=place
        )

    known = found.architecture.without(_not_rounded_blindly(found))
    left_out = tied_copies(checkpoint, known)
    asked = tables_of(checkpoint, known, options, left_out)

    def plan_with(
        bits: Mapping[str, int],
        architecture: Architecture = known,
        *,
        decoded: Decoded = Decoded.NOTHING,
        tables: bool = True,
    ) -> Plan:
        known_of = (found.detection.super_weights, options, found.folds, bits, left_out, asked if tables else {})
        return make_plan(checkpoint, architecture, *known_of, decoded=decoded)

    bits: Mapping[str, int] = {}
    if options.bits_budget is not None:
        bits = bits_within(checkpoint, found, options, plan_with, low_memory=low_memory, progress=progress)
    with progress.step("Rehearsing how stock transformers loads it"):
        plan = rehearsed_plan(
            checkpoint, known, partial(plan_with, bits), offsets=options.offset_kind, stock=stock, kept=kept
        )
    return Prepared(checkpoint, found, plan, low_memory, device, team)


def _not_rounded_blindly(found: Found) -> dict[str, str]:
    """Linear weights whose product no token of the prompt reaches: whether one of them holds a super weight is not
    known. Experts that no token visited are rounded all the same; a mixture loads only if all of its experts are."""
    weights = found.architecture.weights
    reason = "no token of the prompt reaches its product"
    return {name: reason for name in found.unseen if weights[name].kind is LinearKind.LINEAR}


def compress_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: CompressOptions,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    low_memory: bool = False,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Compressed:
    """Probe, plan and write. Raises SwquantError for everything the user can mend."""
    check_destination(out, overwrite, checkpoint)
    prepared = prepare(checkpoint, options, low_memory=low_memory, device=device, progress=progress)
    return write(prepared, out, overwrite=overwrite, fresh=fresh, progress=progress)


def write(
    prepared: Prepared, out: Path, *, overwrite: bool = False, fresh: bool = False, progress: Progress = silent
) -> Compressed:
    """Carry out a plan. `out` appears whole or not at all. An interrupted run is taken up, unless `fresh`."""
    check_destination(out, overwrite, prepared.checkpoint)
    with written(prepared, out, fresh=fresh, progress=progress) as result:
        replace(result.path, out, overwrite)
    return Compressed(out, result.manifest)


@contextmanager
def written(prepared: Prepared, out: Path, *, fresh: bool, progress: Progress) -> Iterator[Compressed]:
    """The finished checkpoint, verified, in a hidden folder beside `out` that does not outlive the block; what an
    interrupted run left there is taken up, unless `fresh`."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    head = head_of(checkpoint, prepared.found, plan, prepared.device.type)
    if not fresh:
        check_leftover(out, head)
    with writing(out, plan.nbytes), resumable(out, fresh=fresh) as hidden:
        folder = hidden / f"{checkpoint.name[:40]}{plan.options.suffix}"
        check_space(out, plan.nbytes - size_of(folder))
        with closing(Journal(hidden / JOURNAL, head)) as journal, one_thread_per_operation():
            manifest = write_all(prepared, journal, folder, progress)
        check_result(folder, out, progress)
        yield Compressed(folder, manifest)
