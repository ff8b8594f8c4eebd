"""`moe`, from end to end: plan -> write the mixture tensor by tensor -> hold it against the dense model -> train ->
rename.

OUT computes what MODEL computes until it is trained, by how its experts begin:

- Beside the MLP (residual): with some or all of its neurons and a down projection of zeros, like LoRA, so that they say
  nothing yet. The coefficients begin at exactly 0.5, so the down projection of the MLP is doubled, which is exact in
  every float: 0.5 * 2 MLP + 0.5 * 0.
- Without it: as copies of the MLP. Whichever a token is given to, the result is the MLP's; only the order differs in
  which a product over fewer tokens is summed up.

`--as qwen2_moe` writes the first under stock names (`stock`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.errors import SwquantError
from exporters.json_file import write_json
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.safetensors import SafetensorsCheckpoint
from swquant.models.devices import device_for
from swquant.models.loading import build_model
from swquant.moe.options import MoeOptions
from swquant.moe.plan import MixturePlan, MoePlan
from swquant.moe.stock import stock_config, stock_tensors
from swquant.moe.training import Course, train_mixture
from swquant.output.dense import Written, dense_folder, stored_form, write_weights
from swquant.output.destination import check_destination
from swquant.parallel import world
from swquant.progress import Progress, silent
from swquant.training.data import text_windows
from swquant.training.loop import State, fingerprint_of
from swquant.training.model import place_of
from swquant.version import __version__

__all__ = ["RECORD", "Mixed", "check_text", "moe_checkpoint"]

RECORD = "moe.json"
_TOKENS = 64  # of the text that mixture and dense model are compared on
# Of the largest logit. Products of fewer rows are summed up in another order, which is all that may differ.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Mixed:
    """A finished mixture. difference: the largest of a logit from the dense model's, in float32, before training.
    course: what training did, None without it."""

    path: Path
    plan: MoePlan
    difference: float
    course: Course | None
    record: Mapping[str, Any]


def check_text(plan: MoePlan, text: tuple[str, str] | None) -> None:
    """Raise SwquantError unless there is a text to train on, long enough, where there are steps, and none where not."""
    if bool(plan.options.steps) != (text is not None):
        raise SwquantError("--steps and --text go together: so many steps on that text")
    if text is not None:
        text_windows(plan.checkpoint, text[1], plan.options.window, text[0]).split()  # refuses what is too short


def moe_checkpoint(
    plan: MoePlan,
    out: Path,
    *,
    text: tuple[str, str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Mixed:
    """Carry out a plan. text: (name, content) to train on; device: where, if there is room. Raises SwquantError for
    everything the user can mend; then `out` does not exist, or is what it was."""
    checkpoint, options, chosen = plan.checkpoint, plan.options, device_for(device)
    check_destination(out, overwrite, checkpoint)
    check_text(plan, text)
    tensors = _tensors(plan)
    dtypes = [item.form.dtype for item in tensors.values() if item.form.dtype.is_floating_point]
    dtype = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    config = stock_config(plan, dtype) if options.stock else plan.config(dtype)
    record: dict[str, Any] = {
        "swquant": __version__,
        "source": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "options": asdict(options),
        "weights": plan.total,
        "active": plan.active,
        "dense": plan.weights,
    }
    course = None
    state = State.at(out.with_name(out.name + ".training"), _fingerprint(checkpoint, options, text, chosen))
    how = (RECORD, record)
    made = dense_folder(plan.checkpoint, out, tensors, config, how, progress, overwrite=overwrite)
    with world().inside(made) as folder:
        with progress.step("Comparing the mixture with the dense model"):
            difference = record["difference"] = _difference(plan, folder)
        if text is not None and options.steps:
            with SafetensorsCheckpoint(folder) as written:
                course, trained = train_mixture(
                    written, text, options, place_of(written, chosen)[0], state=state, progress=progress
                )
            new = {name: replace(tensors[name], make=partial(trained.__getitem__, name)) for name in trained}
            world().same(lambda: write_weights(folder, {**tensors, **new}, progress))
            record["course"] = asdict(course)
        world().same(lambda: write_json(folder / "swquant" / RECORD, record))
    state.remove()
    return Mixed(out, plan, difference, course, record)


def _fingerprint(
    checkpoint: Checkpoint, options: MoeOptions, text: tuple[str, str] | None, device: torch.device
) -> str:
    """Of all that the result depends on."""
    content = None if text is None else hashlib.sha256(text[1].encode()).hexdigest()
    return fingerprint_of("moe", checkpoint.fingerprint, asdict(options), content, device.type)


def _tensors(plan: MoePlan) -> dict[str, Written]:
    """Every tensor of the mixture, under the name of its parameter."""
    by_module = {mixture.module: mixture for mixture in plan.mixtures}
    tensors: dict[str, Written] = {}
    for stored, target in plan.targets.items():
        module = next((name for name in by_module if target.startswith(f"{name}.")), None)
        if module is None:
            tensors[f"model.{target}"] = Written(
                stored_form(plan.checkpoint, stored), partial(plan.checkpoint.read, stored)
            )
        else:
            tensors |= _of_mlp(plan, by_module[module], stored, target.removeprefix(f"{module}."))
    for mixture in plan.mixtures:
        tensors |= _heads(plan, mixture)
    return stock_tensors(plan, tensors) if plan.options.stock else tensors


def _of_mlp(plan: MoePlan, mixture: MixturePlan, stored: str, local: str) -> dict[str, Written]:
    """One tensor of an MLP: of the fixed MLP, and of every expert."""
    made: dict[str, Written] = {}
    name, prefix, copies = local.rpartition(".")[0], f"model.{mixture.module}", not plan.options.residual
    read = partial(plan.checkpoint.read, stored)
    is_down = name == mixture.down
    if plan.options.residual:
        make = (lambda: 2 * read()) if is_down else read
        made[f"{prefix}.mlp.{local}"] = Written(stored_form(plan.checkpoint, stored), make)
    shape = plan.checkpoint.tensors[stored].shape
    axis = _axis(mixture, shape, is_down=is_down)
    small = tuple(side * mixture.size // mixture.neurons if at == axis else side for at, side in enumerate(shape))
    for expert in range(mixture.experts):
        target = f"{prefix}.experts.{expert}.{local}"
        if copies:
            made[target] = Written(stored_form(plan.checkpoint, stored), read)
            continue
        form = stored_form(plan.checkpoint, stored, small)
        if is_down:
            made[target] = Written(form, partial(torch.zeros, small))
        else:
            rows = _neurons(plan, mixture, expert)
            made[target] = Written(form, partial(_sliced, read, rows, mixture.parts[name], mixture.neurons, axis))
    return made


def _axis(mixture: MixturePlan, shape: tuple[int, ...], *, is_down: bool) -> int | None:
    """The side of a tensor of the MLP that its neurons lie along; None of a down projection's bias."""
    if len(shape) == 1:
        return None if is_down else 0
    return int(is_down != mixture.transposed)


def _neurons(plan: MoePlan, mixture: MixturePlan, expert: int) -> Tensor:
    """int64 [size]: the neurons of the MLP that an expert begins with, others for each."""
    generator = torch.Generator().manual_seed(plan.options.seed * 1_000_003 + mixture.layer * 4099 + expert)
    return torch.randperm(mixture.neurons, generator=generator)[: mixture.size].sort().values


def _sliced(read: Callable[[], Tensor], rows: Tensor, repeats: int, neurons: int, axis: int | None) -> Tensor:
    """The neurons `rows` of a weight or bias whose outputs repeat the neurons."""
    every = torch.cat([rows + neurons * part for part in range(repeats)])
    assert axis is not None
    return read().index_select(axis, every)


def _heads(plan: MoePlan, mixture: MixturePlan) -> dict[str, Written]:
    """The gate, small and random so that tokens spread over the experts, and the coefficients, which begin equal."""
    prefix = f"model.{mixture.module}"
    dtype = stored_form(plan.checkpoint, _any_of(plan, mixture)).dtype
    gate = (mixture.experts, mixture.hidden)
    generator = partial(torch.Generator().manual_seed, plan.options.seed * 1_000_003 + mixture.layer)
    heads = {
        f"{prefix}.gate.weight": Written(Stored(dtype, gate), lambda: 0.02 * torch.randn(gate, generator=generator()))
    }
    if plan.options.residual:
        for local, shape in (("weight", (2, mixture.hidden)), ("bias", (2,))):
            heads[f"{prefix}.coefficient.{local}"] = Written(Stored(dtype, shape), partial(torch.zeros, shape))
    return heads


def _any_of(plan: MoePlan, mixture: MixturePlan) -> str:
    return next(stored for stored, target in plan.targets.items() if target.startswith(f"{mixture.module}."))


@torch.no_grad()
def _difference(plan: MoePlan, folder: Path) -> float:
    """The largest difference of a logit, on tokens drawn from the vocabulary. Raises SwquantError where it is more than
    the order of a sum explains."""
    rows = plan.checkpoint.config.vocab_size
    tokens = torch.randint(rows, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    dense = _as_written(plan)
    expected = dense(input_ids=tokens, use_cache=False).logits
    del dense
    with SafetensorsCheckpoint(folder) as written:
        logits = build_model(written, torch.float32)(input_ids=tokens, use_cache=False).logits
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE * max(largest, 1.0):
        raise SwquantError(
            f"{plan.checkpoint.name}: the mixture's logits differ by {difference:.3g} from the dense model's (up to "
            f"{largest:.3g}); its MLP does more than its linear layers show, moe cannot take it"
        )
    return difference


def _as_written(plan: MoePlan) -> Any:
    """The dense model in float32, from weights rounded to the dtype that is written."""
    model = build_model(plan.checkpoint, torch.float32)
    for stored, target in plan.targets.items():
        dtype = stored_form(plan.checkpoint, stored).dtype
        if dtype != torch.float32:
            parameter = model.state_dict()[target]
            parameter.copy_(parameter.to(dtype))
    return model
