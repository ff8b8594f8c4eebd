"""The graph of onnxruntime-genai's model builder, with quantized linears put into it.

The builder knows some twenty architectures and writes them with fused attention and norms: the fastest graphs for ONNX
Runtime, with the `genai_config.json` that onnxruntime-genai runs. Its float export keeps the names of weights
(`model.layers.0.attn.qkv_proj.MatMul.weight`), so the MatMuls can be replaced afterwards. That a name means what it
seems to is not taken on trust: the float weight in the graph must be the model's.

The builder runs as a program of its own, which is the interface that it documents.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from exporters.json_file import read_json
from exporters.onnx.files import GENAI_CONFIG, MODEL
from exporters.onnx.nodes import PackedWeight, stack, take_rows
from exporters.onnx.place import Placer, common_form

__all__ = ["BuilderError", "build_graph", "fix_cache_shapes", "place_weights", "set_embedding_scale", "set_windows"]

_MATMUL = re.compile(r"^(?:model\.layers\.(?P<layer>\d+)\.\w+\.(?P<leaf>\w+)|(?P<head>lm_head))\.MatMul\.weight$")
_EMBEDDING_SCALE = "/model/embed_tokens/Mul"  # a node
_ATTENTION = re.compile(r"^/model/layers\.(\d+)/")
# A weight of the graph that may be several of the model's, stacked, or one of the halves of another.
_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_HALVES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class BuilderError(Exception):
    """What the builder said, or what is wrong with its graph."""


def build_graph(model: Path, out: Path, *, fuse_qkv: bool, half: bool) -> None:
    """Run the builder on a Hugging Face folder of float32 weights. Raises BuilderError with its last words.

    half: float16, which it has for CUDA only; the graph runs on a CPU, too.
    """
    # A cache of the window alone would have a fixed size; ours is the same for all layers and may be empty.
    # Norms of queries and keys inside the attention exist on CUDA only, and the file must run beside torch here.
    options = [
        "hf_token=false",
        "windowed_kv_cache=false",
        "fuse_qk_norm_gqa=false",
        *([] if fuse_qkv else ["disable_qkv_fusion=true"]),
    ]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    command += [
        "-p",
        *(("fp16", "-e", "cuda") if half else ("fp32", "-e", "cpu")),
        "-c",
        str(out / "cache"),
        "--extra_options",
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode or not (out / MODEL).is_file():
        lines = [line.strip() for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
        raise BuilderError(lines[-1] if lines else f"exit code {ran.returncode}")


def _find(weights: Mapping[str, PackedWeight], layer: str, leaf: str) -> str | None:
    """The module `leaf` of decoder layer `layer`."""
    pattern = re.compile(rf"\blayers\.{layer}\..*\b{leaf}$")
    return next((name for name in weights if pattern.search(name)), None)


def _sources(weights: Mapping[str, PackedWeight], layer: str, leaf: str) -> list[tuple[str, slice | None]]:
    """(module, rows of it) that make up a weight of the graph, [] where the model has it dense."""
    if (name := _find(weights, layer, leaf)) is not None:
        return [(name, None)]
    if leaf in _STACKED:
        names = [_find(weights, layer, part) for part in _STACKED[leaf]]
        return [(name, None) for name in names if name is not None] if all(names) else []
    if leaf in _HALVES:
        whole, half = _HALVES[leaf]
        if (name := _find(weights, layer, whole)) is not None:
            rows = weights[name].N // 2
            return [(name, slice(half * rows, (half + 1) * rows))]
    return []


def place_weights(
    path: Path, weights: Mapping[str, PackedWeight], dense: Callable[[str], Tensor], head: str
) -> onnx_ir.Model:
    """The builder's graph with the MatMuls of `weights` replaced. Raises BuilderError where one has no place in it, or
    where the graph multiplies with another weight than the model's.

    dense: module -> its float32 weight [out, in]. head: the name in `weights` of what the graph calls lm_head.
    """
    model = onnx_ir.load(path)
    fix_cache_shapes(model, read_json(path.with_name(GENAI_CONFIG))["model"]["decoder"]["head_size"])
    pieces: dict[str, tuple[onnx_ir.Node, PackedWeight]] = {}
    used: set[str] = set()
    for node in model.graph:
        match = _MATMUL.match(str(node.inputs[1].name)) if node.op_type == "MatMul" and node.inputs[1] else None
        if match is None:
            continue
        if match["head"]:
            sources: list[tuple[str, slice | None]] = [(head, None)] if head in weights else []
        else:
            sources = _sources(weights, match["layer"], match["leaf"])
        if not sources:
            continue
        name = match.string.removesuffix(".MatMul.weight")
        _check_values(name, node, torch.cat([dense(module)[rows or slice(None)] for module, rows in sources]))
        parts = [
            weights[module] if rows is None else take_rows(weights[module], rows.start, rows.stop)
            for module, rows in sources
        ]
        try:
            pieces[name] = (node, stack(parts))
        except ValueError as error:
            raise BuilderError(f"{name}: {error}") from None
        used |= {module for module, _ in sources}
    if lost := sorted(set(weights) - used):
        raise BuilderError(f"{lost[0]} has no place in the graph")
    packed, form = common_form({name: weight for name, (_, weight) in pieces.items()})
    placer = Placer(model)
    if form is not None:
        placer.add_function(form)
    if "lm_head" in pieces:
        _share_table(model, placer, pieces["lm_head"][0].inputs[1], packed["lm_head"])
    for name, (node, _) in pieces.items():
        weight_value = node.inputs[1]
        placer.replace(node, name, packed[name])
        assert weight_value is not None
        if not weight_value.uses():
            model.graph.initializers.pop(str(weight_value.name))
    return model


def _share_table(model: onnx_ir.Model, placer: Placer, head: onnx_ir.Value | None, weight: PackedWeight) -> None:
    """Where the embedding is tied to the head, the builder gathers from the head's weight, transposed."""
    assert head is not None
    for transpose in [node for node in head.consumers() if node.op_type == "Transpose"]:
        (table,) = transpose.outputs
        for gather in [node for node in table.consumers() if node.op_type == "Gather"]:
            placer.replace_embedding(gather, "lm_head", weight)
        if not table.uses():
            model.graph.remove(transpose, safe=True)


def fix_cache_shapes(model: onnx_ir.Model, head_size: int) -> None:
    """The builder leaves the last dimension of keys and values a name; who makes an empty past wants its number."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = onnx_ir.Shape([*list(value.shape)[:-1], head_size])


def set_windows(model: onnx_ir.Model, windows: Sequence[int | None]) -> None:
    """Tell the attention of every layer its sliding window, None for none: the builder does so only where the
    configuration names kinds of layers, not where all of them have one window (Mistral). Raises BuilderError where a
    layer has no attention that knows windows."""
    missing = {layer: window for layer, window in enumerate(windows) if window is not None}
    for node in model.graph:
        match = _ATTENTION.match(str(node.name)) if node.op_type == "GroupQueryAttention" else None
        if match is None or int(match[1]) not in missing:
            continue
        node.attributes["local_window_size"] = onnx_ir.AttrInt64("local_window_size", missing.pop(int(match[1])))
    if missing:
        raise BuilderError(f"layer {min(missing)} of the graph has no attention with a sliding window")


def set_embedding_scale(model: onnx_ir.Model, scale: float) -> None:
    """Multiply embeddings by what the model does: the builder (0.18) rounds Gemma's square root to two decimals, which
    moves logits by 40 times what float32 does."""
    for node in [node for node in model.graph if node.name == _EMBEDDING_SCALE]:
        rounded = node.inputs[1]
        assert rounded is not None
        kind = np.float16 if rounded.dtype is onnx_ir.DataType.FLOAT16 else np.float32
        value = onnx_ir.Value(name="model.embed_tokens.scale", const_value=onnx_ir.tensor(np.array(scale, kind)))
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)


def _check_values(name: str, node: onnx_ir.Node, expected: Tensor) -> None:
    value = node.inputs[1]
    assert value is not None
    found = None if value.const_value is None else value.const_value.numpy()
    if (
        found is None
        or found.shape != tuple(expected.T.shape)
        or not np.array_equal(found, expected.T.numpy().astype(found.dtype))
    ):
        raise BuilderError(f"{name} of the graph is not the model's weight")
