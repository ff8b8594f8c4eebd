"""Which loaders take a compressed checkpoint, and what each does with it: told before it is written, and recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swquant.compress.plan import Plan

__all__ = ["loader_table"]


def loader_table(plan: Plan) -> dict[str, str]:
    """Loader -> what it does with the result, in one sentence each."""
    schemes = {plan.scheme(tensor) for tensor in plan.quantized}
    odd = sorted({scheme.bits for scheme in schemes} - {4, 8}, reverse=True)
    groups = sorted({scheme.group_size for scheme in schemes if scheme.group_size} - {32, 64, 128})
    if plan.decoded:
        vllm = "not tried: what holds its weights is no nn.Linear"
    elif plan.int8_inputs:
        vllm = "yes, with integer products; ignores the sidecar and the channels kept in float"
    elif odd:
        vllm = f"no: its kernels take 4 and 8 bits, not {odd[0]}"
    elif groups:
        vllm = f"no: its kernels take groups of 32, 64, 128 or a channel, not {groups[0]}"
    elif any(".experts." in tensor.name for tensor in plan.quantized):
        vllm = "yes, as mixture of experts; ignores the sidecar"
    else:
        vllm = "yes; ignores the sidecar"
    if not plan.options.symmetric:
        # 0.18 to 0.20 allocate the zero point unpacked and stop with a size mismatch; earlier ones pack odd bits
        # otherwise.
        versions = "0.15 to 0.17 (0.18 to 0.20 stop at packed zero points)"
    else:
        versions = "0.18 or later" if odd and odd[0] != 2 else "0.15 or later"
    ours = "yes; restores every outlier" if plan.options.restore else "yes; nothing to restore"
    stock = f"yes, with compressed-tensors {versions}; ignores the sidecar"
    if plan.decoded:
        stock = "yes, from 5.23 on, which decodes it while loading; ignores the sidecar"
    if plan.int8_inputs:
        ours, stock = f"{ours}, rounds activations", f"{stock}, rounds activations, all channels of them"
    elif plan.options.activations == "int8":
        ours, stock = f"{ours}, rounds activations", f"{stock}, leaves activations in float"
        vllm = f"{vllm}, leaves activations in float" if vllm.startswith("yes") else vllm
    return {"swquant.load": ours, "transformers": stock, "vLLM": vllm}
