"""`distill`, from end to end: find the layers that are missed least -> cut -> teach in stages -> write -> rename.

The student that is cut is held against the teacher with the same layers left out, so that a layer which behaves
otherwise under its new number is noticed. Training goes on after an interruption from OUT.training beside OUT, to the
same bytes; when OUT is there, that file is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.detect.found import Found
from swquant.detect.pipeline import find_super_weights
from swquant.detect.texts import start_token
from swquant.distill.measure import Measured, least_missed, leaving_out, super_layers
from swquant.distill.options import DistillOptions
from swquant.distill.student import StudentCheckpoint
from swquant.distill.teaching import Lesson, teach
from swquant.models.architecture import describe
from swquant.models.loading import build_model
from swquant.models.memory import available_memory
from swquant.output.dense import dense_folder, nbytes_of
from swquant.output.destination import check_destination
from swquant.pr_moe import PrMoeConfig
from swquant.progress import Progress, silent
from swquant.training.loop import State, fingerprint_of
from swquant.units import human_bytes
from swquant.version import __version__

__all__ = ["RECORD", "Distilled", "distill_checkpoint"]

RECORD = "distill.json"
_TOKENS = 64  # of the text that the student is compared on
_TOLERANCE = 1e-4  # of the largest logit
# Tensors as large as a trained parameter: its value, gradient, two moments; three more while a look ahead is taken.
_COPIES, _AHEAD = 4, 4


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
    teacher: Checkpoint,
    out: Path,
    options: DistillOptions,
    *,
    text: tuple[str, str] | None = None,
    progress: Progress = silent,
) -> Distilled:
    """Make a student. text: (name, content) to learn on, the teacher's own by default. Raises SwquantError for
    everything the user can mend; then `out` does not exist."""
    check_destination(out, None, teacher)
    architecture = _check(teacher, options)
    with progress.step(f"Loading {teacher.name}"):
        model = build_model(teacher, torch.float32).requires_grad_(False)
    with progress.step(f"Probing {teacher.name} with one prompt"):
        found = find_super_weights(teacher, model=model)
    keep, measured = _kept(teacher, model, found, options, progress)
    student = StudentCheckpoint(teacher, keep, architecture.layers)
    with progress.step("Comparing the student with the teacher without these layers"):
        pupil = build_model(student, torch.float32).requires_grad_(False)
        difference = _difference(student, model, pupil, [architecture.layers[layer] for layer in _out(keep, found)])
    lesson, trained, state = None, {}, None
    if options.steps:
        state = State.at(out.with_name(out.name + ".training"), _fingerprint(teacher, keep, options, text))
        lesson = teach(
            student, model, pupil, options, start=start_token(teacher, found), text=text, state=state, progress=progress
        )
        trained = _trained(student, pupil)
    del model, pupil
    tensors = student.written(trained)
    record = _record(teacher, options, keep, found, measured, difference, lesson)
    with dense_folder(student, out, tensors, _config(student), (RECORD, record), progress):
        pass
    if state is not None:
        state.remove()
    return Distilled(
        out, keep, len(architecture.layers), measured, super_layers(found), difference, nbytes_of(tensors),
        sum(teacher.dense_dtype(form).itemsize * form.numel for form in teacher.tensors.values()), lesson, record,
    )  # fmt: skip


def _check(teacher: Checkpoint, options: DistillOptions) -> Any:
    """What must be so before anything is loaded. Returns the architecture."""
    if teacher.is_compressed:
        raise SwquantError(f"{teacher.name}: compressed; distill the original, then compress the student")
    composite = teacher.config.get_text_config() is not teacher.config
    if composite and not isinstance(teacher.config, PrMoeConfig):
        raise SwquantError(f"{teacher.name}: a model of several parts; distill takes the text model alone")
    architecture = describe(teacher)
    depth = len(architecture.layers)
    if options.listed(depth) is None:
        options.count_of(depth)
    weights = sum(form.numel for form in teacher.tensors.values())
    ahead = _AHEAD if options.stage(1) is None else 0
    needed = 4 * weights * (2 + (_COPIES - 1 + ahead) * bool(options.steps))
    if needed > available_memory():
        raise SwquantError(
            f"{teacher.name}: teacher and student take {human_bytes(needed)} of memory, {human_bytes(available_memory())} are "
            "free; close other programs, or use a larger machine"
        )
    return architecture


def _out(keep: tuple[int, ...], found: Found) -> list[int]:
    return [layer for layer in range(len(found.architecture.layers)) if layer not in keep]


def _kept(
    teacher: Checkpoint, model: PreTrainedModel, found: Found, options: DistillOptions, progress: Progress
) -> tuple[tuple[int, ...], Measured | None]:
    """The layers that stay, and what was measured to find them."""
    depth, roles = len(found.architecture.layers), super_layers(found)
    named = options.listed(depth)
    if named is not None:
        for layer in sorted(set(roles) - set(named)):
            progress.note(f"layer {layer} {roles[layer]} a super activation, and is left out as was asked for")
        return named, None
    kept = sorted(roles) if options.keep_super else []
    count = depth - options.count_of(depth)
    measured = least_missed(teacher, model, found, count, kept, seed=options.seed, progress=progress)
    return tuple(layer for layer in range(depth) if layer not in measured.dropped), measured


@torch.no_grad()
def _difference(student: StudentCheckpoint, model: Any, pupil: Any, out: list[str]) -> float:
    """The largest difference of a logit between the student and the teacher without its layers. Raises SwquantError
    where that is more than the order of a sum explains."""
    rows = student.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
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
    parameters = {name: value.detach() for name, value in pupil.named_parameters() if value.requires_grad}
    targets = describe(student).targets
    return {stored: parameters[target] for stored, target in targets.items() if target in parameters}


def _fingerprint(
    teacher: Checkpoint, keep: tuple[int, ...], options: DistillOptions, text: tuple[str, str] | None
) -> str:
    """Of all that the result depends on."""
    content = None if text is None else hashlib.sha256(text[1].encode()).hexdigest()
    return fingerprint_of("distill", teacher.fingerprint, list(keep), asdict(options), content)


def _config(student: StudentCheckpoint) -> dict[str, Any]:
    """The student's configuration, with the dtype that is written."""
    forms = [item.form.dtype for item in student.written().values() if item.form.dtype.is_floating_point]
    config = dict(student.raw_config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(max(forms, key=forms.count)).removeprefix("torch.")
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "dtype": config["dtype"]}
    return config


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
