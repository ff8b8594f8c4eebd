"""The graph of a compressed model: through torch's exporter, any architecture that transformers builds, or through
onnxruntime-genai's builder, faster, for those that it knows.

Inputs and outputs have the names that the ecosystem agreed on (optimum, onnxruntime-genai, transformers.js):
`input_ids`, `attention_mask`, `position_ids` and for every layer `past_key_values.N.key` and `.value` in, `logits` and
`present.N.key` and `.value` out. All dimensions are dynamic, and the past may be empty: prompt and next token go
through one graph. The builder's has no `position_ids`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import onnx_ir
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters.errors import SwquantError, first_line
from exporters.json_file import read_json, write_json
from exporters.onnx.dynamo import Placeholder, export_graph
from exporters.onnx.files import MODEL
from exporters.onnx.genai import BuilderError, build_graph, place_weights, set_embedding_scale, set_windows
from exporters.onnx.nodes import PackedWeight
from swquant.models.loading import quiet

__all__ = ["CausalGraph", "dynamo_graph", "embedding_scale", "genai_graph", "save_for_builder"]


_DYNAMIC = "dynamic"


class CausalGraph(nn.Module):
    """The model with its key-value cache as plain tensors: two for every layer, [batch, heads, past, size]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits [batch, sequence, vocabulary], then the keys and values of every layer with the new ones appended."""
        # A plain cache: told of sliding windows, it would drop what the masks hide anyway, and its length with it.
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = {"position_ids": position_ids} if self._positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        present = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
        return (output.logits, *present)


class _DynamicRotary(nn.Module):
    """Rotary embeddings whose frequencies follow the length, as a function of it alone: transformers keeps those of the
    longest text so far in the module, and torch cannot trace the branch that does it."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._frequencies = ROPE_INIT_FUNCTIONS[_DYNAMIC]
        rotary.rope_type = "default"  # type: ignore[assignment]  # what follows is done here

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine and the sine of every position."""
        frequencies, _ = self._frequencies(self.rotary.config, x.device, seq_len=position_ids.max() + 1)
        return cast("tuple[Tensor, Tensor]", functional_call(self.rotary, {"inv_freq": frequencies}, (x, position_ids)))


def _put_rotary(model: PreTrainedModel) -> None:
    for name, module in [*model.named_modules()]:
        if getattr(module, "rope_type", None) == _DYNAMIC:
            model.set_submodule(name, _DynamicRotary(module))


def _put_placeholders(model: PreTrainedModel, weights: Mapping[str, PackedWeight]) -> None:
    for name, weight in weights.items():
        bias = model.get_submodule(name).bias
        model.set_submodule(name, Placeholder(name, weight.N, bias.data if isinstance(bias, Tensor) else None))


def _cache_form(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, size) of keys and values, layer by layer. Raises SwquantError where the model keeps anything else."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    layers = getattr(output.past_key_values, "layers", None)
    if not layers or not all(
        isinstance(part, Tensor) and part.ndim == 4 for layer in layers for part in (layer.keys, layer.values)
    ):
        raise SwquantError(
            f"{type(model).__name__}: keeps more than keys and values between tokens; only attention models can be exported"
        )
    return [(part.shape[1], part.shape[3]) for layer in layers for part in (layer.keys, layer.values)]


def dynamo_graph(
    model: PreTrainedModel, weights: Mapping[str, PackedWeight], name: str, tied: str | None = None
) -> onnx_ir.Model:
    """The ONNX graph of a model whose linears named in `weights` are packed; the model loses them.

    tied: the output head among them whose codes are the embedding's, too. Raises SwquantError where torch cannot.
    """
    form = _cache_form(model)
    _put_placeholders(model, weights)
    _put_rotary(model)
    batch, sequence, past = 2, 3, 4  # all different and none 1, which the exporter would take for constants
    dtype = model.dtype
    arguments = (
        torch.ones(batch, sequence, dtype=torch.int64),
        torch.ones(batch, past + sequence, dtype=torch.int64),
        torch.arange(past, past + sequence).repeat(batch, 1),
        [torch.zeros(batch, heads, past, size, dtype=dtype) for heads, size in form],
    )
    free = torch.export.Dim.DYNAMIC
    rows = {0: free, 1: free}
    shapes = (rows, rows, rows, [{0: free, 2: free}] * len(form))
    parts = [f"{layer}.{part}" for layer in range(len(form) // 2) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
    outputs = ["logits", *(f"present.{part}" for part in parts)]
    dimensions: dict[str, list[str | int]] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", model.config.get_text_config().vocab_size],
    }
    for part, (heads, size) in zip(parts, form, strict=True):
        dimensions[f"past_key_values.{part}"] = ["batch", heads, "past_sequence", size]
        dimensions[f"present.{part}"] = ["batch", heads, "total_sequence", size]
    try:
        return export_graph(
            CausalGraph(model).eval(),
            arguments,
            shapes,
            inputs,
            outputs,
            dimensions,
            weights,
            None if tied is None else (tied, cast(Tensor, model.get_input_embeddings().weight).detach()),
        )
    except Exception as error:  # the exporter raises anything
        raise SwquantError(
            f"{name}: torch cannot export {type(model).__name__} to ONNX ({first_line(error)}); serve the checkpoint with "
            "transformers or vLLM"
        ) from None


def save_for_builder(model: PreTrainedModel, folder: Path) -> None:
    """The model as a Hugging Face folder of float32 weights, its configuration as the builder reads it."""
    with quiet():
        model.save_pretrained(folder, max_shard_size="5GB")
    adapt_config(folder)


def adapt_config(folder: Path) -> None:
    """What the builder (0.18) looks for under the names of older configurations. Where kinds of layers have rotary
    embeddings of their own (Gemma 3), transformers 5 nests their parameters by kind: those of full attention are wanted
    on top, and the base of sliding attention under its old name. Of longrope, the kind and the length at which it
    changes."""
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope and "sliding_attention" in rope:
        rope |= rope["full_attention"] | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    elif rope.get("rope_type") == "longrope":
        rope["type"] = "longrope"
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    else:
        return
    write_json(folder / "config.json", config)


def embedding_scale(model: PreTrainedModel, prompt: tuple[int, ...]) -> float:
    """What the model multiplies the embeddings of tokens by before its first layer sees them."""
    with torch.no_grad():
        seen = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[0][0]
        stored = model.get_input_embeddings().get_parameter("weight")[list(prompt)]
        return float((seen / stored)[stored != 0].median())


def genai_graph(
    source: Path,
    out: Path,
    weights: Mapping[str, PackedWeight],
    dense: Callable[[str], Tensor],
    head: str,
    name: str,
    windows: Sequence[int | None],
    scale: float,
    *,
    half: bool,
) -> onnx_ir.Model:
    """The builder's graph of the model in `source`, its MatMuls replaced. `out`: a scratch folder that the builder
    fills; its files must live as long as the graph. windows: the sliding window of every layer, None for none. scale:
    that of embeddings. half: in float16. Raises SwquantError where the builder does not know the architecture.
    """
    families: dict[str, set[tuple[object, ...]]] = {}
    for module, weight in weights.items():
        parent, _, leaf = module.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            families.setdefault(parent, set()).add(weight.form)
    count = sum(module.endswith((".q_proj", ".k_proj", ".v_proj")) for module in weights)
    alike = all(len(forms) == 1 for forms in families.values()) and count in (0, 3 * len(families))
    try:
        build_graph(source, out, fuse_qkv=alike, half=half)
        graph = place_weights(out / MODEL, weights, dense, head)
        set_windows(graph, windows)
        set_embedding_scale(graph, scale)
        return graph
    except BuilderError as error:
        raise SwquantError(
            f"{name}: onnxruntime-genai's builder cannot export this model ({error}); use --graph dynamo"
        ) from None
