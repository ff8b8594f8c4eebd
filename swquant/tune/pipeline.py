"""`tune`, from end to end: the only module that knows the order of things.

    plan -> text -> choose blocks (selection) -> learning rate (rates) -> train (training.loop) -> write

What an interrupted run has done is kept in the file OUT.tuning beside OUT: the text that was written, the blocks, the
rate, the steps. The next run with the same checkpoint, text and options goes on from there, to the same bytes; when OUT
is there, the file is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from calibrationless import CPU, Blocks, QuantizedTensor, moved, restore
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import holds_patches
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.patched import PatchedCheckpoint
from swquant.checkpoints.schema import CheckpointManifest, PatchesManifest, TuningRecord
from swquant.checkpoints.tokenizer import begins_with
from swquant.compress.report import REPORT
from swquant.evaluate.pipeline import evaluate_model
from swquant.output.destination import check_destination
from swquant.parallel import world
from swquant.progress import Progress, silent
from swquant.training.data import Corpus, own_windows
from swquant.training.loop import Schedule, State, fingerprint_of, train
from swquant.training.model import lay, place_of, trainable_model, trained_parameters
from swquant.training.over_original import source_of, write_patches, write_whole
from swquant.training.patched import free_name, write_patched
from swquant.training.rates import settle
from swquant.training.scales import ScaledWeight
from swquant.tune.plan import TunePlan
from swquant.tune.records import tuning_record
from swquant.tune.report import tuning_page
from swquant.tune.selection import chosen, named, scores
from swquant.tune.session import Session

__all__ = ["Tuned", "tune_checkpoint"]


@dataclass(frozen=True)
class Tuned:
    """What was written, and the name of the set of blocks. manifest: of the checkpoint, or of the patches
    alone; None where a whole model was written. record: how it was trained. evaluation: measure ->
    (before, after) on a text to evaluate on, {} where there is none."""

    path: Path
    manifest: CheckpointManifest | PatchesManifest | None
    set: str
    record: TuningRecord
    evaluation: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def tune_checkpoint(
    plan: TunePlan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    name: str = "tuned",
    eval_text: str | None = None,
    device: torch.device = CPU,
) -> Tuned:
    """Carry out a plan, on a device if the model fits there. `out` appears whole or not at all. name: of the set of
    blocks; a number is added where it is taken. eval_text: to measure on, before and after. Raises SwquantError."""
    check_destination(out, overwrite, plan.checkpoint)
    state = State.at(out.with_name(out.name + ".tuning"), _fingerprint(plan, device))
    of_set = free_name(plan.checkpoint.manifest if isinstance(plan.checkpoint, CompressedCheckpoint) else None, name)
    place, said = place_of(plan.checkpoint, device)
    with progress.step(f"Loading {plan.checkpoint.name}{said}"):
        model = trainable_model(plan.checkpoint, place)
        teacher = None
        if plan.against is not None:  # on a GPU, if it fits beside the other
            teacher = trainable_model(plan.against, place_of(plan.against, place)[0])
    corpus, held = (plan.given or _own_text(plan, teacher, state, progress)).split()
    session = Session(model, teacher, corpus, held, plan.options)
    places = _places(plan, session, state, progress) if plan.count else {}
    weights = {name: candidate.weight for name, candidate in plan.pool.items()}
    layers = lay(model, plan.checkpoint, weights, places, packed=place.type == "cpu", scales=plan.scales)
    values = trained_parameters(layers)
    schedule = Schedule(plan.options.steps, 0.0, tokens=plan.tokens // plan.options.steps)
    facts = state.saved.facts
    if "rate" not in facts:
        _settle_rate(session, values, schedule, state, progress)
    trained = train(values, session.loss_of, replace(schedule, rate=facts["rate"]), state=state, progress=progress)
    blocks = {name: layers[name].trained(torch.bfloat16) for name in places}
    for name in places:  # what is measured is what is stored; of scales it always was
        layers[name].values.data.copy_(layers[name].values.to(torch.bfloat16))
    frozen = {name: layer.frozen for name, layer in layers.items()}
    scaled = {name: moved(item.trained, "cpu") for name, item in frozen.items() if isinstance(item, ScaledWeight)}
    with progress.step("Measuring held-out text"):
        after = session.held_out()
    if not after < facts["before"]:
        progress.note(
            f"Held-out loss did not fall ({facts['before']:.4f} before, {after:.4f} after): more text, more steps or "
            "another --lr may help"
        )
    record = tuning_record(plan, blocks, facts, trained.losses, after)
    manifest = world().same(lambda: _written(plan, out, of_set, blocks, scaled, record, overwrite, progress))
    state.remove()
    measured = {} if eval_text is None else world().same(lambda: _evaluated(plan, out, eval_text, progress))
    evaluation = {measure: (before, after) for measure, (before, after) in measured.items()}
    return Tuned(out, manifest, of_set, record, evaluation)


def _written(
    plan: TunePlan,
    out: Path,
    of_set: str,
    blocks: Mapping[str, Blocks],
    scaled: Mapping[str, QuantizedTensor],
    record: TuningRecord,
    overwrite: bool,
    progress: Progress,
) -> CheckpointManifest | PatchesManifest | None:
    """OUT: the checkpoint with one more set; of an original, the blocks alone or the whole model."""
    checkpoint = plan.checkpoint
    if isinstance(checkpoint, CompressedCheckpoint):
        report = checkpoint.folder / REPORT
        old = report.read_text(encoding="utf-8") if report.is_file() else None
        html = tuning_page(old, checkpoint.name, of_set, record, {name: len(patch) for name, patch in blocks.items()})
        return write_patched(
            checkpoint, out, of_set, blocks, record,
            scaled=scaled, files={REPORT: html.encode()}, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not plan.whole:
        return write_patches(checkpoint, out, of_set, blocks, record, overwrite=overwrite, progress=progress)

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        return restore(tensor.clone(), blocks[name]) if name in blocks else tensor

    write_whole(checkpoint, out, read, source_of(checkpoint), {of_set: record}, progress, overwrite=overwrite)
    return None


def _evaluated(plan: TunePlan, out: Path, text: str, progress: Progress) -> dict[str, tuple[float, float]]:
    """What `evaluate` says of the checkpoint and of OUT, in windows of 512 tokens at most."""
    base, trust = plan.checkpoint, plan.checkpoint.trust_remote_code  # the base is closed twice, which it may be
    with PatchedCheckpoint(out, base) if holds_patches(out) else open_checkpoint(out, trust_remote_code=trust) as tuned:
        before, after = (
            asdict(evaluate_model(model, text, plan.against, window=512, progress=progress))
            for model in (plan.checkpoint, tuned)
        )
    names = ("perplexity", "kl", "top1")
    return {name: (before[name], after[name]) for name in names if before[name] is not None}


def _settle_rate(
    session: Session,
    values: Mapping[str, torch.nn.Parameter],
    schedule: Schedule,
    state: State,
    progress: Progress,
) -> None:
    """Put the learning rate into the state, with what else the record needs of the time before the first step."""
    facts, options = state.saved.facts, session.options
    with progress.step("Measuring held-out text"):
        facts["before"] = session.held_out()
    settle(options.rate, facts, values, session.loss_of, session.held_out, schedule, progress, usual=1e-3)
    facts["tokens"] = sum(session.batch_of(step).tokens for step in range(options.steps))
    state.write()


def _fingerprint(plan: TunePlan, device: torch.device) -> str:
    """Of all that the result depends on; another kind of device sums up otherwise."""
    against, given = (None if item is None else item.fingerprint for item in (plan.against, plan.given))
    return fingerprint_of(plan.checkpoint.fingerprint, against, given, dict(plan.options.as_dict()), device.type)


def _own_text(plan: TunePlan, teacher: PreTrainedModel | None, state: State, progress: Progress) -> Corpus:
    """What the original writes at temperature 1."""
    assert plan.against is not None
    assert teacher is not None
    options, saved = plan.options, state.saved.tensors
    known, start = "text" in saved, begins_with(plan.against)
    corpus = own_windows(
        teacher, start, saved, options.seed, progress, texts=options.texts, length=options.window, name=plan.data
    )
    if not known:
        state.write()
    return corpus


def _places(plan: TunePlan, session: Session, state: State, progress: Progress) -> dict[str, Blocks]:
    """The blocks to train, as zeros."""
    side, saved = plan.options.block, state.saved.tensors
    if not any(name.startswith("rows/") for name in saved):
        mine = session.warmup()[world().share(plan.options.warmup)]
        found = scores(
            plan.select,
            plan.pool,
            session.model,
            _shown(mine, plan.options.batch * plan.options.window, progress),
            checkpoint=plan.checkpoint,
            against=plan.against,
            seed=plan.options.seed,
        )
        saved |= world().same_tensors(lambda: named(chosen(found, plan.pool, plan.count)))
        state.write()
    names = [name for name in plan.pool if f"rows/{name}" in saved]
    return {
        name: Blocks(rows := saved[f"rows/{name}"], saved[f"cols/{name}"], torch.zeros(len(rows), side, side))
        for name in names
    }


def _shown(
    losses: list[Callable[[], torch.Tensor]], tokens: int, progress: Progress
) -> Iterator[Callable[[], torch.Tensor]]:
    """The losses of the warm-up, one after the other, with progress. tokens: of each."""
    with progress.tokens("Choosing blocks", len(losses) * tokens) as bar:
        for loss in losses:
            yield loss
            bar.advance("", tokens)
