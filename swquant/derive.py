"""The Python interface, continued: models that are made of models, what they say, and where they go.

Users import it from `swquant`. As in `api`, the rooms of the verbs are imported when a function is called, and
`progress` is told what goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from exporters.errors import SwquantError
from swquant.adapt.options import AdaptKeywords, AdaptOptions
from swquant.declared import made_of
from swquant.distill.options import DistillKeywords, DistillOptions
from swquant.merge.options import MergeKeywords, MergeOptions
from swquant.moe.options import MoeKeywords, MoeOptions
from swquant.progress import Progress, silent
from swquant.tune.options import TuneKeywords, TuneOptions

if TYPE_CHECKING:
    from swquant.adapt.pipeline import Adapted
    from swquant.adapt.plan import AdaptPlan
    from swquant.checkpoints.pool_schema import DecisionRecord
    from swquant.distill.pipeline import Distilled
    from swquant.distill.plan import DistillPlan
    from swquant.merge.pipeline import Merged
    from swquant.moe.pipeline import Mixed
    from swquant.moe.plan import MoePlan
    from swquant.push.pipeline import Pushed
    from swquant.tune.pipeline import Tuned
    from swquant.tune.plan import TunePlan

__all__ = ["adapt", "distill", "export_set", "generate", "merge", "moe", "push", "tune"]

Model = str | os.PathLike[str]


def adapt(
    checkpoint: Model,
    out: Model,
    tasks: Mapping[str, Model],
    options: AdaptOptions | None = None,
    *,
    drop: Sequence[str] = (),
    imports: Sequence[Model] = (),
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[AdaptPlan], None] | None = None,
    progress: Progress = silent,
    **changes: Unpack[AdaptKeywords],
) -> Adapted | dict[str, DecisionRecord]:
    """Learn tasks one after the other over a compressed checkpoint, which stays as it is: each in a set of the pool
    that it does not hurt, or in a new one.

    tasks: name -> a text, or a jsonl file of prompts and responses. drop: sets that leave the pool; imports: files of
    sets that come in. out: the folder to create; an interrupted run leaves OUT.adapting beside it and goes on from
    that. options and changes: an `AdaptOptions`, or its fields as keywords (policy, threshold, budget, steps, …).
    on_plan: is shown the plan before the work. Returns path, manifest and the set of each task; after dry_run task ->
    what would be decided about it next. Raises SwquantError; then `out` does not exist.

    "LW2G: Learning Whether to Grow for Prompt-based Continual Learning", https://arxiv.org/abs/2409.18860
    """
    if not (tasks or drop or imports):
        raise SwquantError("there is nothing to learn; name a task and its text: --task law=law.txt")
    from swquant.adapt.pipeline import adapt_checkpoint, decide_only
    from swquant.adapt.plan import make_plan
    from swquant.checkpoints.open import open_checkpoint
    from swquant.models.devices import device_for
    from swquant.output.destination import check_destination
    from swquant.parallel import join

    chosen = made_of(AdaptOptions, options, changes)
    join(chosen.batch)
    place = device_for(device)
    with open_checkpoint(checkpoint, trust_remote_code=trust_remote_code) as opened:
        if not dry_run:
            check_destination(Path(out), overwrite, opened)
        named = [(name, Path(path)) for name, path in tasks.items()]
        plan = make_plan(opened, named, chosen, drop=drop, imports=[Path(path) for path in imports])
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            return decide_only(plan, progress, device=place)
        return adapt_checkpoint(plan, Path(out), overwrite=overwrite, progress=progress, device=place)


def export_set(checkpoint: Model, of_set: str, out: Model, *, overwrite: bool = False) -> None:
    """Copy a set of a checkpoint's pool into a file, which `adapt(…, imports=…)` takes into the pool of another
    checkpoint of the same base. Raises SwquantError."""
    from swquant.adapt.pool import export_set as copy_set
    from swquant.checkpoints.compressed import CompressedCheckpoint

    with CompressedCheckpoint(Path(checkpoint)) as opened:
        copy_set(opened, of_set, Path(out), overwrite=overwrite)


def distill(
    teacher: Model,
    out: Model,
    options: DistillOptions | None = None,
    *,
    text: tuple[str, str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_plan: Callable[[DistillPlan], None] | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
    **changes: Unpack[DistillKeywords],
) -> Distilled | None:
    """Make a student with fewer layers than its teacher, an ordinary Hugging Face folder, and teach it.

    teacher: a Hugging Face folder, a .gguf file, a hub id, or a mixture made by `moe`. text: (name, content) to learn
    on, by default what the teacher writes. options and changes: a `DistillOptions`, or its fields as keywords
    (keep_layers, layers, steps, kd_until, …). on_plan: is shown the plan before anything is loaded. dry_run: nothing
    is, and None comes back. Returns path, the layers that were kept and what was measured. Raises SwquantError; then
    `out` does not exist, and what was trained is gone on from by the next run.
    """
    chosen = made_of(DistillOptions, options, changes)
    from swquant.checkpoints.open import open_checkpoint
    from swquant.distill.pipeline import distill_checkpoint
    from swquant.distill.plan import make_plan
    from swquant.output.destination import check_destination
    from swquant.parallel import join

    join(chosen.batch)
    with open_checkpoint(teacher, trust_remote_code=trust_remote_code) as checkpoint:
        if not dry_run:  # nobody is shown a plan to be refused
            check_destination(Path(out), overwrite, checkpoint)
        plan = make_plan(checkpoint, chosen, text=text, device=device)
        if on_plan is not None:
            on_plan(plan)
        return None if dry_run else distill_checkpoint(plan, Path(out), overwrite=overwrite, progress=progress)


def generate(
    model: Model,
    prompt: str,
    *,
    tokens: int = 40,
    chat: bool = False,
    restore: bool = True,
    task: str | None = None,
    base: Model | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> str:
    """Continue a prompt greedily, until a token ends the text. Returns the prompt and what follows.

    chat: the prompt is what a user says, put into the model's chat template; what comes back is the answer alone.
    on_text: is given the text piece by piece, as it is written; together they are what is returned. task, base: see
    `load`. Raises SwquantError.
    """
    from swquant.checkpoints.open import open_model
    from swquant.evaluate.writing import generate_text
    from swquant.models.devices import device_for

    place = device_for(device)
    with open_model(model, restored=restore, task=task, base=base, trust_remote_code=trust_remote_code) as checkpoint:
        return generate_text(
            checkpoint, prompt, tokens=tokens, chat=chat, device=place, on_text=on_text, progress=progress
        )


def merge(
    checkpoint: Model,
    out: Model,
    options: MergeOptions | None = None,
    *,
    eval_text: str | None = None,
    against: Model | None = None,
    base: Model | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **changes: Unpack[MergeKeywords],
) -> Merged:
    """Bake what was trained over a checkpoint (`tune`) into its codes, for loaders that know no sidecar.

    Only the tensors that lose a patch are rounded anew, on their own scales, with error feedback from text that the
    tuned model writes; all else is copied. eval_text: to measure on, as a stock loader sees the checkpoint before, as
    `swquant.load` does, and merged; against: the original to compare with there, by default the tuned model itself.
    options and changes: a `MergeOptions`, or its fields as keywords (set_, points, texts, seed). Returns path, manifest
    and what it cost (`record`). Raises SwquantError; then `out` does not exist.

    base: the original, where checkpoint is a folder of patches alone: OUT is then the whole model, an ordinary Hugging
    Face folder, which costs nothing but rounding to its dtype.
    """
    chosen = made_of(MergeOptions, options, changes)
    from swquant.checkpoints.open import open_checkpoint
    from swquant.checkpoints.patched import PatchedCheckpoint
    from swquant.merge.pipeline import make_plan, merge_checkpoint, merge_patches
    from swquant.models.devices import device_for

    place = device_for(device)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(checkpoint, trust_remote_code=trust_remote_code, base=base))
        original = None
        if against is not None:
            original = stack.enter_context(open_checkpoint(against, trust_remote_code=trust_remote_code))
        if isinstance(opened, PatchedCheckpoint):
            return merge_patches(opened, chosen, Path(out), overwrite=overwrite, progress=progress)
        return merge_checkpoint(
            make_plan(opened, chosen),
            Path(out),
            overwrite=overwrite,
            progress=progress,
            eval_text=eval_text,
            against=original,
            device=place,
        )


def moe(
    model: Model,
    out: Model,
    options: MoeOptions | None = None,
    *,
    text: tuple[str, str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_plan: Callable[[MoePlan], None] | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
    **changes: Unpack[MoeKeywords],
) -> Mixed | None:
    """Turn MLPs of a dense model into mixtures of experts. Without steps OUT computes what the model computes.

    text: (name, content) to train on, with `steps`. options and changes: a `MoeOptions`, or its fields as keywords
    (experts, every, residual, top, expert_size, …). on_plan: is shown the plan before anything is written. dry_run:
    nothing is, and None comes back. Returns path, plan and the largest difference of a logit. Raises SwquantError;
    then `out` does not exist.
    """
    chosen = made_of(MoeOptions, options, changes)
    from swquant.checkpoints.open import open_checkpoint
    from swquant.moe.pipeline import check_text, moe_checkpoint
    from swquant.moe.plan import make_plan
    from swquant.output.destination import check_destination
    from swquant.parallel import join

    join(chosen.batch)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        if not dry_run:  # nobody is shown a plan to be refused
            check_destination(Path(out), overwrite, checkpoint)
        plan = make_plan(checkpoint, chosen)
        check_text(plan, text)
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            return None
        return moe_checkpoint(plan, Path(out), text=text, device=device, overwrite=overwrite, progress=progress)


def push(
    checkpoint: Model,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Publish a folder made by swquant on the Hugging Face hub, if every byte of it is as it was written.

    repository: OWNER/NAME, made where there is none; private: only then. dry_run: only verify, and say what would be
    sent. Returns the files with their sizes, and the commit's address. Raises SwquantError; then nothing was published.
    """
    from swquant.push.pipeline import push_folder

    return push_folder(Path(checkpoint), repository, private=private, dry_run=dry_run, progress=progress)


def tune(
    checkpoint: Model,
    out: Model,
    options: TuneOptions | None = None,
    *,
    against: Model | None = None,
    text: str | None = None,
    data: Model | None = None,
    text_name: str = "text",
    eval_text: str | None = None,
    whole: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[TunePlan], None] | None = None,
    progress: Progress = silent,
    **changes: Unpack[TuneKeywords],
) -> Tuned | None:
    """Train a few blocks of weights over a model, which stays as it is, and of a compressed one its scales.

    checkpoint: a compressed checkpoint, with whose sidecar OUT has one more set; or an original, of which OUT holds
    the blocks alone (`load(OUT, base=…)`), or with `whole` all of it, an ordinary Hugging Face folder.

    against: the original. Its predictions are learned, on text that it writes itself unless there is another. text: to
    train on; data: a jsonl file of prompts and responses. eval_text: to measure on before and after. out: the folder to
    create; an interrupted run leaves OUT.tuning beside it and goes on from that. options and changes: a `TuneOptions`,
    or its fields as keywords (budget, block, select, steps, lr, …). on_plan: is shown the plan before the work, which
    dry_run leaves out. Returns path, manifest and the name of the set (nothing after a dry run). Raises SwquantError;
    then `out` does not exist.

    "Sparse Matrix in Large Language Model Fine-tuning", https://arxiv.org/abs/2405.15525
    """
    from swquant.models.devices import device_for
    from swquant.output.destination import check_destination
    from swquant.parallel import join
    from swquant.tune.pipeline import tune_checkpoint

    chosen = made_of(TuneOptions, options, changes)
    join(chosen.batch)
    place = device_for(device)
    with _tune_plan(checkpoint, chosen, against, text, data, text_name, whole, trust_remote_code) as planned:
        if not dry_run:  # nobody is shown a plan to be refused
            check_destination(Path(out), overwrite, planned.checkpoint)
        if on_plan is not None:
            on_plan(planned)
        if dry_run:
            return None
        return tune_checkpoint(
            planned, Path(out), overwrite=overwrite, progress=progress, eval_text=eval_text, device=place
        )


@contextmanager
def _tune_plan(
    checkpoint: Model,
    options: TuneOptions,
    against: Model | None,
    text: str | None,
    data: Model | None,
    text_name: str,
    whole: bool,
    trust_remote_code: bool,
) -> Iterator[TunePlan]:
    """The plan, while its models are open."""
    from swquant.checkpoints.open import open_checkpoint
    from swquant.tune.plan import make_plan

    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(checkpoint, trust_remote_code=trust_remote_code))
        original = None
        if against is not None:
            original = stack.enter_context(open_checkpoint(against, trust_remote_code=trust_remote_code))
        given = None if text is None else (text_name, text)
        file = None if data is None else Path(data)
        yield make_plan(opened, options, against=original, text=given, data=file, whole=whole)
