"""The probe: one forward pass of one short prompt, watched.

While the model runs, every product of a watched weight is seen twice, as input and as output, and only
a few numbers of each are kept: the largest magnitudes with their coordinates, the *energy* of every input
channel (which later says which channels matter) and the most that it holds, for a down projection the terms that make
up its largest outputs, and which norm the input came from. Of the residual stream, the largest value of every channel
after every layer and, if the prompt is short, all of it. Whole activations are not stored otherwise.

Watching happens at the call of the matrix product, not on modules: `nn.Linear`, GPT-2's `Conv1D` and
one expert's slice of a fused 3-D parameter all end in `linear`, `addmm`, `matmul` or `bmm`, so one small
interceptor serves every architecture, and it sees weights that are only in memory during the call.
The same place can take a scalar weight out (`prune`): the product then uses a copy with a zero. Or put another weight
in (`replace`), for what a pass with a few rounded weights would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from calibrationless.records import Probe, Residual, Scalar, Watch
from calibrationless.watcher import Watcher

__all__ = ["is_norm", "run_probe"]

# Of so many tokens the residual stream is kept whole: 170 MB of a model with 80 layers and 8192 channels.
_WHOLE = 64


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm of any make: named so, without parts, a gain and perhaps a bias."""
    gain = module._parameters.get("weight")
    return (
        type(module).__name__.lower().endswith("norm")
        and not module._modules
        and gain is not None
        and gain.ndim == 1
        and set(module._parameters) <= {"weight", "bias"}
    )


def _residual(hidden: Any) -> Residual:
    """hidden: [1, tokens, hidden], or a tuple or a list that starts with it."""
    state = (hidden[0] if isinstance(hidden, tuple | list) else hidden).detach()
    state = state.reshape(-1, state.shape[-1]).to(torch.float32)
    magnitudes = state.abs()
    tokens = magnitudes.argmax(dim=0)
    values = state.gather(0, tokens.unsqueeze(0)).squeeze(0)
    # A copy: some layers add to the same memory.
    whole = state.clone() if state.shape[0] <= _WHOLE else None
    return Residual(values, tokens, magnitudes.median(dim=1).values, whole)


def _watch_norm(watcher: Watcher, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            if name in watcher.scales:
                output = output / watcher.scales[name].to(output.dtype)
            watcher.norms[name] = output
            return output

    return keep


def run_probe(
    model: nn.Module,
    forward: Callable[[], Tensor],
    watches: Sequence[Watch],
    layers: Sequence[str],
    *,
    prune: Sequence[Scalar] = (),
    scales: Mapping[str, Tensor] | None = None,
    replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    record: bool = True,
) -> Probe:
    """Run `forward` once and return what was seen.

    forward: runs the prompt through `model` and returns its logits [tokens, vocabulary].
    layers: names of the decoder layers, first to last. prune: weights to leave out of this pass.
    scales: name of a norm -> [channels]; its output is divided by them and the weights that read it multiplied.
    replace: name of a watched weight -> what makes another [out, in] weight of it, for this pass.
    record: False keeps the logits only (ablation needs no more).
    Raises ValueError if a layer or a watched module does not exist, or a weight to prune is not watched.
    """
    modules = dict(model.named_modules())
    missing = [name for name in (*layers, *(watch.module for watch in watches)) if name not in modules]
    if missing:
        raise ValueError(f"the model has no module {missing[0]!r}")
    known = {watch.name for watch in watches}
    if unknown := [scalar.name for scalar in prune if scalar.name not in known]:
        raise ValueError(f"cannot prune {unknown[0]!r}: it is not watched")

    watcher = Watcher(watches, prune, scales or {}, replace or {}, record)
    residual: list[Residual] = []
    with ExitStack() as stack:
        for name in watcher.by_module:
            module = modules[name]
            enter = lambda module, args, name=name: watcher.inside.append((name, module))  # noqa: E731
            leave = lambda module, args, output: watcher.inside.pop() and None  # noqa: E731
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for name, module in modules.items():
            if is_norm(module):
                stack.callback(module.register_forward_hook(_watch_norm(watcher, name)).remove)
        if record and layers:

            def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                residual.append(_residual(args[0] if args else kwargs["hidden_states"]))

            stack.callback(modules[layers[0]].register_forward_pre_hook(first, with_kwargs=True).remove)
            for name in layers:
                keep = lambda module, args, output: residual.append(_residual(output))  # noqa: E731
                stack.callback(modules[name].register_forward_hook(keep).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(watcher)
        logits = forward()
    feeding = {record.norm for record in watcher.linears.values()}
    norms = {name: output for name, output in watcher.norms.items() if name in feeding}
    return Probe(watcher.linears, norms, residual, logits.detach().to(torch.float32))
