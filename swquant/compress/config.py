"""config.json of a compressed checkpoint: the original's, and what tells stock loaders which modules are packed and
how.

Loaders match the names in it with the modules of *their* model. transformers renames what is stored while it loads (an
image-text Gemma 3 is stored as `language_model.model.…` and built as `model.language_model.…`), vLLM maps the stored
names to its own. So a module that has two names is named both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from exporters import affine_layout, compressed_tensors
from exporters.sidecar import SIDECAR
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.manifest import MANIFEST
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.tables import EMBEDDING
from swquant.models.architecture import Architecture
from swquant.version import __version__

__all__ = ["checkpoint_config"]

# The layout written here is the one that this version of compressed-tensors reads and writes.
_FORMAT_VERSION = "0.20.0"
# vLLM builds Llama's embedding, and others, without a name: it finds them by a part of their class's.
_EMBEDDINGS = "Embedding"


def _modules(tensor: TensorPlan, architecture: Architecture) -> Iterator[str]:
    """The names that loaders know a tensor's module by: as it is stored, and as transformers builds it."""
    yield tensor.module
    built = architecture.targets.get(tensor.name, tensor.name).removesuffix(".weight")
    if built != tensor.module:
        yield built


def checkpoint_config(checkpoint: Checkpoint, plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """What is written as config.json."""
    schemes = {name: plan.scheme(tensor) for tensor in plan.quantized for name in _modules(tensor, architecture)}
    dense = [
        name
        for tensor in plan.tensors
        if tensor.block is None
        and tensor.name.endswith(".weight")
        and len(tensor.source.shape) == 2
        and tensor.reason != "embedding"
        for name in _modules(tensor, architecture)
    ]
    if "lm_head" not in dense and "lm_head" not in schemes:
        dense.append("lm_head")
    config = dict(checkpoint.raw_config)
    if plan.options.parsed_dtype is not None:
        config["dtype"] = plan.options.dtype
        config.pop("torch_dtype", None)
    if plan.options.offset_kind == "byte":  # which no loader reads; the folder is exported, then removed
        config.pop("quantization_config", None)
    elif plan.options.offset_kind == "float":
        (scheme,) = set(schemes.values())
        assert scheme.group_size is not None
        config["quantization_config"] = affine_layout.quantization_config(scheme.bits, scheme.group_size, dense)
    else:
        classes = {plan.scheme(tensor): _EMBEDDINGS for tensor in plan.tables if tensor.table == EMBEDDING}
        told = compressed_tensors.quantization_config(schemes, dense, _FORMAT_VERSION, classes)
        config["quantization_config"] = told
    if plan.decoded and (plan.options.offset_kind == "none" or plan.tables):  # Apple's kernels know linear layers alone
        config["quantization_config"]["dequantize"] = True
    config["swquant"] = {"version": __version__, "manifest": MANIFEST, "sidecar": SIDECAR}
    return config
