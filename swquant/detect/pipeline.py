"""Detection on a checkpoint: bring up the model, run the prompt, ask `calibrationless.detect`.

The pass runs in float32 on one thread. Ten tokens cost little, and the evidence in the manifest is then the
same on any number of threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from calibrationless import CPU, Probe, Scalar, detect, moved, one_thread_per_operation, run_probe
from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import encode
from swquant.detect.folds import find_folds
from swquant.detect.found import Found
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.detect.published import published_for
from swquant.detect.texts import runs_on
from swquant.models.architecture import Architecture, describe
from swquant.models.converted import as_built
from swquant.models.devices import place_for
from swquant.models.loading import build_model, offloaded_model, quiet
from swquant.models.memory import fits_in_memory
from swquant.models.stock import empty_model

__all__ = ["find_super_weights", "probed_model", "prompt_tokens", "run_text", "watchable"]

# Evidence needs one short prompt; a longer one costs memory and finds the same.
MAX_PROMPT_TOKENS = 512


def prompt_tokens(checkpoint: Checkpoint, prompt: str) -> tuple[int, ...]:
    """Token ids of the prompt with the special tokens the tokenizer adds by itself. Super activations sit on the first
    token, whichever that is. Raises SwquantError for an empty or overlong prompt, and tokens that the model lacks."""
    with quiet():
        ids = encode(checkpoint, prompt)
    if not 1 <= len(ids) <= MAX_PROMPT_TOKENS:
        raise SwquantError(f"the prompt has {len(ids)} tokens; give 1 to {MAX_PROMPT_TOKENS} (about 10 are enough)")
    return tuple(ids)


@contextmanager
def probed_model(checkpoint: Checkpoint, low_memory: bool, device: torch.device = CPU) -> Iterator[PreTrainedModel]:
    """The model in float32, its weights left in their files where memory is too small or `low_memory` asks for it. On a
    GPU where `place_for` finds room for it, which is then no question of memory."""
    if not low_memory and (place := place_for(checkpoint, torch.float32, device)[0]).type != "cpu":
        yield build_model(checkpoint, torch.float32, place)
        return
    if low_memory or (checkpoint.can_stay_on_disk and not fits_in_memory(checkpoint, torch.float32)):
        with offloaded_model(checkpoint, torch.float32) as model:
            yield model
    else:
        yield build_model(checkpoint, torch.float32)


@contextmanager
def watchable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model runs on one thread, and its experts one after the other, as plain products: the fused kernels
    cannot be watched."""
    threads, experts = torch.get_num_threads(), getattr(model.config, "_experts_implementation", None)
    torch.set_num_threads(1)
    model.config._experts_implementation = "eager"
    try:
        yield
    finally:
        model.config._experts_implementation = experts
        torch.set_num_threads(threads)


def run_text(model: PreTrainedModel, architecture: Architecture, tokens: torch.Tensor, **options: Any) -> Probe:
    """One pass of int64 [texts, tokens]. options: those of `run_probe`. Its logits are [texts, tokens, vocabulary]. The
    model may be on any device; what was seen is on the CPU."""
    device = runs_on(model)
    probe = run_probe(
        model,
        lambda: model(input_ids=tokens.to(device), use_cache=False).logits,
        architecture.watches,
        architecture.layers,
        **moved(options, device),
    )
    return moved(probe, CPU)


@contextmanager
def _text_alone(checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[None]:
    """What models say that want more than token ids, as a SwquantError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise SwquantError(
            f"{checkpoint.name}: {type(model).__name__} does not run on text alone ({first_line(error)}); swquant compresses "
            "models that write text"
        ) from None


@one_thread_per_operation()
def find_super_weights(
    checkpoint: Checkpoint,
    prompt: str = DEFAULT_PROMPT,
    *,
    low_memory: bool = False,
    model: PreTrainedModel | None = None,
    folds: bool = False,
    device: torch.device = CPU,
) -> Found:
    """Find the super weights of a checkpoint with forward passes of one prompt.

    low_memory: keep one module's weights in memory at a time (chosen by itself for models that take more than half of
    the free memory in float32). model: the checkpoint's model in float32, where it is in memory anyway. folds: also
    find out which norms can take over a scaling of weights. device: where the passes run, if the model fits there.
    Raises SwquantError where the prompt, the tokenizer or the weights are unusable, or no down projection was seen.
    """
    ids = prompt_tokens(checkpoint, prompt)
    empty = empty_model(checkpoint)
    checkpoint = as_built(checkpoint, empty)
    architecture = describe(checkpoint, empty)
    tokens = torch.tensor(ids)
    with ExitStack() as stack:
        if model is None:
            model = stack.enter_context(probed_model(checkpoint, low_memory, device))
        probed = model
        stack.enter_context(watchable(probed))

        def run(
            prune: Sequence[Scalar] = (), record: bool = False, scales: Mapping[str, torch.Tensor] | None = None
        ) -> Probe:
            with _text_alone(checkpoint, probed):
                probe = run_text(probed, architecture, tokens.unsqueeze(0), prune=prune, scales=scales, record=record)
            return replace(probe, logits=probe.logits[0])

        try:
            detection, probe = detect(run, architecture.downs, tokens)
        except ValueError as error:
            raise SwquantError(f"{checkpoint.name}: {error}; check the weights (NaN, Inf) and the prompt") from None
        _check_seen(checkpoint, architecture, probe, type(probed).__name__)
        foldable = (
            find_folds(checkpoint, architecture, probe, lambda scales: run(scales=scales).logits) if folds else ()
        )
    words = tuple(checkpoint.tokenizer().convert_ids_to_tokens(list(ids)))
    unseen = (_unseen(architecture, probe), _unseen_layers(architecture, probe))
    return Found(
        detection,
        probe,
        architecture,
        prompt,
        ids,
        words,
        foldable,
        published_for(checkpoint),
        checkpoint.name,
        *unseen,
    )


def _check_seen(checkpoint: Checkpoint, architecture: Architecture, probe: Probe, model: str) -> None:
    if not any(name in probe.linears for name in architecture.downs):
        raise SwquantError(
            f"{checkpoint.name}: swquant saw no product of a down projection (it looked for {len(architecture.downs)}); "
            f"{model} multiplies in a way that swquant does not know, serve the original"
        )


def _unseen(architecture: Architecture, probe: Probe) -> tuple[str, ...]:
    """Stored linear weights whose product was not seen; for an expert's, not through any expert of its layer."""
    seen = {(_of_any(watch.module), watch.parameter) for watch in architecture.watches if watch.name in probe.linears}
    return tuple(
        weight.name
        for weight in architecture.weights.values()
        if (_of_any(weight.module), weight.parameter) not in seen
    )


def _of_any(module: str) -> str:
    """A module's name; the same for all experts of a layer where each is a module of its own."""
    return re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.*.", module)


def _unseen_layers(architecture: Architecture, probe: Probe) -> tuple[int, ...]:
    seen = {layer for name, layer in architecture.downs.items() if name in probe.linears}
    return tuple(layer for layer in range(len(architecture.layers)) if layer not in seen)
