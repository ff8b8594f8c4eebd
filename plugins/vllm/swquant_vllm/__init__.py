"""swquant-vllm: vLLM with the sidecar of swquant checkpoints, the exact outliers and the trained blocks.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on its compressed-tensors
is ours: the same for every other checkpoint, and for those of swquant the same with `sidecar`'s patches added to what
the kernels give.

    sidecar.py   what lies in the checkpoint, read without trust        (torch, safetensors)
    added.py     which of it a rank holds, and the modules that add it  (torch)
    plugin.py    the joints with vLLM                                   (vllm)
"""

from __future__ import annotations

__all__ = ["MADE_FOR", "register"]

MADE_FOR = "0.32 and 0.33"


def register() -> None:
    """Put our quantization config in the place of vLLM's. May be called more than once. Raises RuntimeError where this
    vLLM has another interface than the one that the plugin was made for."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from swquant_vllm.plugin import CheckedConfig, check_interface

        check_interface()
    except (AttributeError, ImportError, TypeError) as error:
        import vllm

        raise RuntimeError(
            f"swquant-vllm was made for vLLM {MADE_FOR}, and {vllm.__version__} differs ({error}): install another version of "
            "either, or set VLLM_PLUGINS= to run without outliers"
        ) from error
    register_quantization_config("compressed-tensors")(CheckedConfig)
