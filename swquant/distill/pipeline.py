"""`distill`, from end to end: find the layers that are missed least -> cut -> teach in stages -> write -> rename.

The student that is cut is held against the teacher with the same layers left out, so that a layer which behaves
otherwise under its new number is noticed. Training goes on after an interruption from OUT.training beside OUT, to the
same bytes; when OUT is there, that file is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import begins_with
from swquant.detect.found import Found
from swquant.detect.pipeline import find_super_weights
from swquant.distill.measure import Measured, least_missed, leaving_out, super_layers
from swquant.distill.options import DistillOptions
from swquant.distill.plan import DistillPlan
from swquant.distill.student import StudentCheckpoint
from swquant.distill.teaching import Lesson, teach, windows_of
from swquant.models.architecture import describe
from swquant.models.devices import named
from swquant.models.loading import build_model
from swquant.output.dense import dense_folder, nbytes_of, with_dtype
from swquant.output.destination import check_destination
from swquant.parallel import world
from swquant.progress import Progress, silent
from swquant.training.loop import State, fingerprint_of
from swquant.version import __version__

__all__ = ["RECORD", "Distilled", "distill_checkpoint"]

RECORD = "distill.json"
_TOKENS = 64  # of the text that the student is compared on
_TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Distilled:
    """A finished student. keep: the teacher's layers that it has. measured: what leaving each out does, None where the
    layers were named. roles: layer -> what it does to a super activation. difference: the largest of a logit from the
    teacher's without the same layers, before training. lesson: what was taught, None without steps."""

    path: Path
    keep: tuple[int, ...]
    depth: int
    measured: Measured | None
    roles: Mapping[int, str]
    difference: float
    nbytes: int
    teacher_bytes: int
    lesson: Lesson | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.depth) if layer not in self.keep)


def distill_checkpoint(
    plan: DistillPlan, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> Distilled:
    """Carry out a plan. Raises SwquantError for everything the user can mend; then `out` does not exist, or is what it
    was."""
    teacher, options = plan.teacher, plan.options
    check_destination(out, overwrite, teacher)
    with progress.step(f"Loading {teacher.name}{named(plan.device)}"):
        model = build_model(teacher, torch.float32, plan.device).requires_grad_(False)
    with progress.step(f"Probing {teacher.name} with one prompt"):
        found = find_super_weights(teacher, model=model)
    keep, measured = _kept(plan, model, found, progress)
    keep = tuple(world().same(lambda: keep))
    student = StudentCheckpoint(teacher, keep, plan.layers)
    with progress.step("Comparing the student with the teacher without these layers"):
        pupil = build_model(student, torch.float32, plan.device).requires_grad_(False)
        out_of = [name for layer, name in enumerate(plan.layers) if layer not in keep]
        difference = _difference(student, model, pupil, out_of)
    lesson, trained, state = None, {}, None
    if options.steps:
        state = State.at(out.with_name(out.name + ".training"), _fingerprint(plan, keep))
        corpus = plan.given or windows_of(teacher, model, options, begins_with(teacher), state, progress)
        lesson = teach(student, model, pupil, options, corpus, state=state, progress=progress)
        trained = _trained(student, pupil)
    del model, pupil
    tensors = student.written(trained)
    record = _record(teacher, options, keep, found, measured, difference, lesson)
    config = with_dtype(student.raw_config, tensors)
    folder = dense_folder(student, out, tensors, config, (RECORD, record), progress, overwrite=overwrite)
    with world().inside(folder):
        pass
    if state is not None:
        state.remove()
    roles, nbytes = super_layers(found), nbytes_of(tensors)
    return Distilled(out, keep, len(plan.layers), measured, roles, difference, nbytes, plan.nbytes[0], lesson, record)


def _kept(
    plan: DistillPlan, model: PreTrainedModel, found: Found, progress: Progress
) -> tuple[tuple[int, ...], Measured | None]:
    """The layers that stay, and what was measured to find them."""
    depth, roles, options = len(plan.layers), super_layers(found), plan.options
    if plan.keep is not None:
        for layer in sorted(set(roles) - set(plan.keep)):
            progress.note(f"layer {layer} {roles[layer]} a super activation, and is left out as was asked for")
        return plan.keep, None
    kept = sorted(roles) if options.keep_super else []
    measured = least_missed(plan.teacher, model, found, depth - plan.count, kept, seed=options.seed, progress=progress)
    return tuple(layer for layer in range(depth) if layer not in measured.dropped), measured


@torch.no_grad()
def _difference(student: StudentCheckpoint, model: Any, pupil: Any, out: list[str]) -> float:
    """The largest difference of a logit between the student and the teacher without its layers. Raises SwquantError
    where that is more than the order of a sum explains."""
    rows = student.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    with leaving_out(model, out):
        expected = model(input_ids=tokens, use_cache=False).logits
    difference = float((pupil(input_ids=tokens, use_cache=False).logits - expected).abs().max())
    if not difference <= _TOLERANCE * max(float(expected.abs().max()), 1.0):
        raise SwquantError(
            f"{student.name}: its logits differ by {difference:.3g} from the teacher's without these layers; a layer depends on "
            "its number, distill cannot take layers of this architecture away"
        )
    return difference


def _trained(student: StudentCheckpoint, pupil: nn.Module) -> dict[str, Tensor]:
    """Stored name -> what training made of it."""
    parameters = {name: value.detach().cpu() for name, value in pupil.named_parameters() if value.requires_grad}
    targets = describe(student).targets
    return {stored: parameters[target] for stored, target in targets.items() if target in parameters}


def _fingerprint(plan: DistillPlan, keep: tuple[int, ...]) -> str:
    """Of all that the result depends on."""
    given = None if plan.given is None else plan.given.fingerprint
    return fingerprint_of(
        "distill", plan.teacher.fingerprint, list(keep), asdict(plan.options), given, plan.device.type
    )


def _record(
    teacher: Checkpoint,
    options: DistillOptions,
    keep: tuple[int, ...],
    found: Found,
    measured: Measured | None,
    difference: float,
    lesson: Lesson | None,
) -> dict[str, Any]:
    """How the student was made, for swquant/distill.json."""
    return {
        "swquant": __version__,
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint},
        "options": asdict(options),
        "layers": len(found.architecture.layers),
        "keep": list(keep),
        "super": {str(layer): role for layer, role in sorted(super_layers(found).items())},
        "alone": None if measured is None else {str(layer): kl for layer, kl in measured.alone.items()},
        "order": None if measured is None else [{"layer": layer, "kl": kl} for layer, kl in measured.order],
        "difference": difference,
        "lesson": None if lesson is None else asdict(lesson),
    }
