"""From a checkpoint to a running transformers model, in memory or with one layer's weights at a time.

Both ways go through `from_pretrained`, so conversions (fused experts, renamed layers, tied embeddings) are
transformers' own, and a weight that is missing is an error, never a random number.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.pool import AUTO
from swquant.checkpoints.stored import all_finite
from swquant.interrupts import sigterm_interrupts
from swquant.models.architecture import describe
from swquant.models.memory import check_memory
from swquant.models.rounded_inputs import round_inputs
from swquant.models.routing import route
from swquant.models.stock import empty_model
from swquant.models.streaming import stream
from swquant.scratch import temporary_folder

__all__ = ["build_model", "offloaded_model", "quiet", "running_model"]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers or accelerate: what matters, swquant says itself."""
    verbosity = transformers.logging.get_verbosity()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _load(checkpoint: Checkpoint, folder: str | None, **options: Any) -> PreTrainedModel:
    """from_pretrained, which leaves random numbers where a weight is missing or misshapen: here both are errors."""
    empty: Any = empty_model(
        checkpoint
    )  # its configuration is the text part of a composite one where its class wants that
    try:
        model, info = type(empty).from_pretrained(
            folder,
            config=copy.deepcopy(empty.config),
            **options,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(
            f"{checkpoint.name}: transformers cannot load these weights ({first_line(error)}); fetch the model again"
        ) from None
    problem = next((f"lacks {name}" for name in sorted(info["missing_keys"])), None)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        problem = problem or f"has the shape {list(stored)} for {name}, the model {list(wanted)}"
    if problem:
        raise SwquantError(f"{checkpoint.name}: the checkpoint {problem}; config.json belongs to another model")
    return model.eval()


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model with all weights in memory, as `dtype` (its own if None). Raises SwquantError if some are missing,
    or no numbers."""
    check_memory(checkpoint, dtype)
    with quiet():
        state = {name: checkpoint.read(name) for name in checkpoint.tensors}
        # transformers wraps .to() in a way mypy cannot follow, hence Any.
        model: Any = _load(checkpoint, None, state_dict=state, dtype=dtype or "auto")
    if name := next((name for name, value in model.named_parameters() if not all_finite(value.detach())), None):
        raise SwquantError(
            f"{checkpoint.name}: {name} holds a NaN or infinite value as {model.dtype}; fetch the model again"
        )
    return model.to(device)


def running_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model as it is to be run: `build_model` with the settings of generation_config.json, and with activations
    rounded where the checkpoint says so. It chooses a set of the pool for every text where the task is `auto`."""
    model = build_model(checkpoint, dtype, device)
    _settle_generation(model, checkpoint)
    if isinstance(checkpoint, CompressedCheckpoint):
        if checkpoint.task == AUTO:
            route(model, checkpoint)
        if checkpoint.manifest["activations"]:
            return round_inputs(model, checkpoint.manifest, describe(checkpoint), restored=checkpoint.restored)
    return model


def _settle_generation(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model its generation_config.json: what it was built from holds none of the ids that end a chat."""
    settings = checkpoint.generation
    if not settings or not model.can_generate():
        return
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_dict(settings)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(
            f"{checkpoint.name}: generation_config.json is not usable ({first_line(error)}); mend it, or fetch it again"
        ) from None


@contextmanager
def offloaded_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The model with its weights left in their files, read module by module as the forward pass needs them."""
    if not checkpoint.can_stay_on_disk:
        raise SwquantError(
            f"{checkpoint.name}: a {checkpoint.kind} model must fit in memory; convert it to safetensors first"
        )
    with sigterm_interrupts(), temporary_folder("offload") as folder, quiet():
        forms = checkpoint.tensors.items()
        state = {name: torch.empty(form.shape, dtype=form.dtype, device="meta") for name, form in forms}
        empty = _load(checkpoint, None, state_dict=state, dtype=dtype, device_map={"": "meta"})
        yield stream(checkpoint, empty, dtype, folder)
