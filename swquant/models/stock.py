"""The class that stock transformers loads a checkpoint with, built without memory for its weights.

Which class that is, the Auto classes decide, so they are asked: the causal model of the configuration, or of its text
part where the configuration is composite; failing that, the image-text model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint, check_depth
from swquant.checkpoints.guard import silent_transformers

__all__ = ["auto_class", "empty_model", "table_modules"]

# In the order in which they are asked.
_AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)

# What was built already: architecture, conversions, probe and the own text all ask for it.
_BUILT: WeakKeyDictionary[Checkpoint, PreTrainedModel] = WeakKeyDictionary()


def auto_class(config: Any) -> Any:
    """The Auto class that knows a configuration, the first where none does: its error says why."""
    brought = getattr(config, "auto_map", None) or {}
    known = (auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping or auto.__name__ in brought)
    return next(known, _AUTO_CLASSES[0])


def table_modules(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the modules that tokens are looked up in and that make the logits, "" for one that it does not have."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names.get(id(of), "") for of in (model.get_input_embeddings(), model.get_output_embeddings()))
    return embedding, head


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without memory for its weights, to be looked at and never changed: all who ask get the same one. Raises
    SwquantError where transformers has no language model for it, or where the configuration claims so many weights that
    making room for them could bring down the machine."""
    if (built := _BUILT.get(checkpoint)) is not None:
        return built
    check_depth(checkpoint.name, checkpoint.config, len(checkpoint.tensors))
    model = _build(checkpoint)
    stored = sum(tensor.numel for tensor in checkpoint.tensors.values())
    if model.num_parameters() > 4 * stored:
        raise SwquantError(
            f"{checkpoint.name}: the configuration claims {model.num_parameters():,} weights, but there are only "
            f"{stored:,}; it belongs to another model"
        )
    _BUILT[checkpoint] = model
    return model


def _build(checkpoint: Checkpoint) -> PreTrainedModel:
    auto = auto_class(checkpoint.config)
    try:
        with silent_transformers(), torch.device("meta"):
            return auto.from_config(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(
            f"{checkpoint.name}: transformers cannot build this model ({first_line(error)}); "
            "swquant compresses language models that write text"
        ) from None
