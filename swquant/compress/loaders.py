"""Which loaders take a compressed checkpoint, and what each does with it: told before it is written, and recorded.

What is said of vLLM was seen with 0.32 on a CPU (`make test-vllm`); what its CUDA kernels take is what its sources say.
vLLM makes one layer of weights that read the same input (q/k/v, gate/up) and takes it only if all are stored alike: one
of them dense is refused, other bits end in an assertion without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swquant.compress.choice import Decoded
from swquant.compress.tables import EMBEDDING, TIED

if TYPE_CHECKING:
    from swquant.compress.plan import Plan

__all__ = ["fused_layer", "loader_table"]

_PLUGIN = "ignores the sidecar (swquant-vllm restores it)"
_EMBEDDING = "where its model tells the embedding how it is stored (Llama's and Qwen's do, Mixtral's does not)"
# Modules that vLLM's models make one layer of: the `packed_modules_mapping` of those that write text.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_LAYER = {part: "+".join(parts) for parts in _FUSED for part in parts}


def fused_layer(name: str) -> str:
    """The layer that vLLM makes of a stored weight: the same for weights that it fuses."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_LAYER.get(module, module)}"


def _unlike(plan: Plan) -> str:
    """The first two weights that vLLM fuses and that are not stored alike; "" where all of them are."""
    layers: dict[str, dict[str, str]] = {}
    for tensor in plan.tensors:
        if tensor.name.endswith(".weight"):
            stored = "dense" if tensor.block is None else str(plan.scheme(tensor))
            layers.setdefault(fused_layer(tensor.name), {}).setdefault(stored, tensor.module)
    for parts in layers.values():
        if len(parts) > 1:
            (first, one), (second, other) = list(parts.items())[:2]
            return f"{one} is {first} and {other.rpartition('.')[2]} {second}"
    return ""


def _vllm(plan: Plan) -> str:
    """vLLM's verdict: of the kernels for weights alone, those for CPUs know 4 bits, Marlin's on CUDA some groups."""
    if plan.options.offset_kind == "float":
        return "no: it knows no quant_method metal, the layout that holds offsets"
    if plan.decoded is Decoded.CODES:
        return "no: in GPT-2 and Falcon, where it was tried, it found no place for codes of what is no nn.Linear"
    if unlike := _unlike(plan):
        return f"no: it fuses layers whose weights must be stored alike, and {unlike}"
    roles = {tensor.table for tensor in plan.tables}
    if TIED in roles:
        return "no: it ties the output head to an embedding of floats, and this one is packed"
    if EMBEDDING in roles and not plan.options.symmetric:
        return "no: its packed embeddings have no zero points"
    if plan.int8_inputs and not roles:
        return "yes, with integer products; ignores the sidecar and the channels kept in float (swquant-vllm restores both)"
    where = _kernels(plan)
    if EMBEDDING in roles:
        where = f"on CUDA, by its sources, {_EMBEDDING}" if where.startswith("yes") else f"{where}, {_EMBEDDING}"
    return f"{where}; {_PLUGIN}"


def _kernels(plan: Plan) -> str:
    """Where it has kernels for the schemes of a plan."""
    schemes = {plan.scheme(tensor) for tensor in plan.quantized}
    bits = sorted({scheme.bits for scheme in schemes} - {4})
    groups = sorted({scheme.group_size for scheme in schemes if scheme.group_size} - {32, 64, 128})
    if odd := [number for number in bits if number != 8]:
        why = f"others take 4 and 8 bits, not {odd[0]}"
    elif bits and not plan.options.symmetric:
        why = "others take no zero points of 8 bits"
    elif bits and groups:
        why = f"others take groups of 32, 64, 128 or a channel, not {groups[0]}"
    else:
        return _where(plan, bits, groups)
    return f"on CUDA with Humming's kernels only, by its sources: {why}"


def _where(plan: Plan, bits: Sequence[int], groups: Sequence[int]) -> str:
    """On which devices. bits, groups: those of the plan that only some kernels take."""
    if bits:
        return f"yes on CUDA, by its sources; not on a CPU, where its kernel takes 4 bits, not {bits[0]}"
    if any(".experts." in tensor.name for tensor in plan.quantized):
        return "yes on CUDA, by its sources; not on a CPU, where it has no kernel for packed experts"
    if groups:
        known = f"groups of 32, 64, 128 or a channel, not {groups[0]}"
        return f"yes on a CPU; on CUDA, by its sources, Marlin's kernels take {known}, and Humming's all"
    return "yes"


def loader_table(plan: Plan) -> dict[str, str]:
    """Loader -> what it does with the result, in one sentence each."""
    odd = any(tensor.bits not in (2, 4, 8) for tensor in plan.quantized)  # packed in another way before 0.18
    vllm = _vllm(plan)
    ours = "yes; restores every outlier" if plan.options.restore else "yes; nothing to restore"
    stock = f"yes, with compressed-tensors {'0.18' if odd else '0.15'} or later; ignores the sidecar"
    if plan.options.offset_kind == "byte":
        return {"ONNX Runtime": "yes; adds every outlier"}
    if plan.options.offset_kind == "float":
        stock = 'yes, from 5.23 on, with device_map="cpu" or another device; ignores the sidecar'
    elif plan.decoded:
        stock = "yes, from 5.23 on, which decodes it while loading; ignores the sidecar"
    elif not plan.options.symmetric:  # on the way to another format, or written with a later compressed-tensors
        stock = "only with a compressed-tensors that makes room for packed zero points (0.18 to 0.20 stop at them)"
    if plan.int8_inputs:
        ours, stock = f"{ours}, rounds activations", f"{stock}, rounds activations, all channels of them"
    elif plan.options.activations == "int8":
        ours, stock = f"{ours}, rounds activations", f"{stock}, leaves activations in float"
        vllm = f"{vllm}, leaves activations in float" if vllm.endswith(_PLUGIN) else vllm
    if plan.unread:
        stock = f"no: {plan.unread}; after import swquant.hf, yes"
    if plan.mixture:
        stock = "no: it knows no pr_moe by itself; after swquant.pr_moe.register(), yes, and ignores the sidecar"
        vllm = "no: it knows no pr_moe"
    return {"swquant.load": ours, "transformers": stock, "vLLM": vllm}
