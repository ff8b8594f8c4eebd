"""The probe: one forward pass of one short prompt, watched.

While the model runs, every product of a watched weight is seen twice, as input and as output, and only
a few numbers of each are kept: the largest magnitudes with their coordinates, the *energy* of every input
channel (which later says which channels matter) and the most that it holds, for a down projection the terms that make up its largest
output, and which norm the input came from. Of the residual stream, the largest value of every channel after
every layer. Whole activations are never stored.

Watching happens at the call of the matrix product, not on modules: `nn.Linear`, GPT-2's `Conv1D` and
one expert's slice of a fused 3-D parameter all end in `linear`, `addmm` or `matmul`, so one small
interceptor serves every architecture, and it sees weights that are only in memory during the call.
The same place can take a scalar weight out (`prune`): the product then uses a copy with a zero. Or put another weight in
(`replace`), for what a pass with a few rounded weights would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Contribution", "LinearRecord", "Peak", "Probe", "Residual", "Scalar", "Watch", "is_norm", "run_probe"]

# How many of the terms behind a largest output are kept.
_CONTRIBUTIONS = 8


@dataclass(frozen=True)
class Watch:
    """A weight to watch: `parameter` of module `module` (slice `expert` of it, if it is 3-D).

    down: whether it is the down projection of an MLP, whose outputs are explained term by term.
    transposed: stored [in, out] (Conv1D, some fused experts).
    """

    name: str
    module: str
    parameter: str = "weight"
    expert: int | None = None
    down: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Scalar:
    """One weight of a watched tensor: `name`[row, col], row = output channel, col = input channel."""

    name: str
    row: int
    col: int


@dataclass(frozen=True)
class Peak:
    """The value of largest magnitude of an activation [tokens, channels], signed, and where it is."""

    value: float
    token: int
    channel: int
    median: float  # median magnitude of that token's channels: what the peak stands out from

    @property
    def ratio(self) -> float:
        """How many times its own token's median the peak is."""
        return abs(self.value) / self.median if self.median > 0 else float("inf") if self.value else 0.0


@dataclass(frozen=True)
class Contribution:
    """One term x[token, col] * weight[row, col] of a down projection's largest output."""

    col: int
    input: float
    weight: float
    share: float  # of the output value; the shares of all columns (and the bias) sum to 1


@dataclass(frozen=True)
class LinearRecord:
    """What one product showed.

    energy: float32 [in], mean over tokens of x^2 / |x|^2: the share of an input channel in its token. Every token counts
    the same; in a plain mean square the one token that carries the super activation would drown out all others.
    peaks: float32 [in], the largest |x| of every input channel.
    norm: name of the module whose output the input is, "" if it is no norm's.
    """

    input: Peak
    output: Peak
    energy: Tensor
    peaks: Tensor
    contributions: tuple[Contribution, ...] = ()
    norm: str = ""


@dataclass(frozen=True)
class Residual:
    """The residual stream between two layers. values: float32 [hidden], the signed value of largest
    magnitude of every channel; tokens: int64 [hidden], where it is."""

    values: Tensor
    tokens: Tensor
    medians: Tensor  # float32 [tokens]: median magnitude of each token's channels


@dataclass
class Probe:
    """Everything one pass leaves. residual[0] enters the first layer, residual[i + 1] leaves layer i."""

    linears: dict[str, LinearRecord] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)  # outputs of norms that feed a product, [tokens, channels]
    residual: list[Residual] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def _peak(activation: Tensor) -> Peak:
    """activation: float32 [tokens, channels]."""
    magnitudes = activation.abs()
    token, channel = divmod(int(magnitudes.argmax()), activation.shape[1])
    median = float(magnitudes[token].median())
    return Peak(float(activation[token, channel]), token, channel, median)


def _explain(inputs: Tensor, weight: Tensor, output: Peak) -> tuple[Contribution, ...]:
    """The largest terms of output.value = sum over col of inputs[token, col] * weight[row, col]."""
    if output.value == 0:
        return ()
    x, row = inputs[output.token], weight[output.channel].to(torch.float32)
    terms = x * row / output.value
    shares, cols = terms.topk(min(_CONTRIBUTIONS, terms.numel()))
    return tuple(
        Contribution(int(col), float(x[col]), float(row[col]), float(share))
        for share, col in zip(shares.tolist(), cols.tolist(), strict=True)
    )


@dataclass(frozen=True)
class _Product:
    """How a function takes its factors: (position, keyword) of each. in_out: the weight is given as [in, out]."""

    inputs: tuple[int, str]
    weight: tuple[int, str]
    in_out: bool = True


_PRODUCTS: Mapping[Any, _Product] = {
    torch.nn.functional.linear: _Product((0, "input"), (1, "weight"), in_out=False),
    torch.addmm: _Product((1, "mat1"), (2, "mat2")),
    torch.matmul: _Product((0, "input"), (1, "other")),
    torch.mm: _Product((0, "input"), (1, "mat2")),
    torch.Tensor.matmul: _Product((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: _Product((0, "self"), (1, "other")),
}


def _argument(where: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position, keyword = where
    return args[position] if len(args) > position else kwargs.get(keyword)


def _with_weight(product: _Product, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(args, kwargs) with another weight."""
    position, keyword = product.weight
    if len(args) > position:
        return (*args[:position], weight, *args[position + 1 :]), kwargs
    return args, {**kwargs, keyword: weight}


def _experts(watch: Watch, parameter: Tensor) -> int:
    return 1 if watch.expert is None else parameter.shape[0]


class _Watcher(TorchFunctionMode):
    """Sees every product while it is active; `inside` holds the watched modules being executed."""

    def __init__(
        self,
        watches: Iterable[Watch],
        prune: Sequence[Scalar],
        scales: Mapping[str, Tensor],
        replace: Mapping[str, Callable[[Tensor], Tensor]],
        record: bool,
    ):
        super().__init__()
        self.by_module: dict[str, list[Watch]] = {}
        for watch in watches:
            self.by_module.setdefault(watch.module, []).append(watch)
        self.prune: dict[str, list[Scalar]] = {}
        for scalar in prune:
            self.prune.setdefault(scalar.name, []).append(scalar)
        self.scales = scales
        self.replace = replace
        self.record = record
        self.norms: dict[str, Tensor] = {}
        self.inside: list[tuple[str, nn.Module]] = []
        self.linears: dict[str, LinearRecord] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func) if self.inside else None
        if product is None:
            return func(*args, **kwargs)
        weight: Tensor = _argument(product.weight, args, kwargs)
        watch = self._find(weight)
        if watch is None:
            return func(*args, **kwargs)
        if watch.name in self.prune:
            # A copy with zeros, rather than a difference of the outputs: exact in every dtype.
            weight = weight.detach().clone()
            for scalar in self.prune[watch.name]:
                weight[(scalar.col, scalar.row) if product.in_out else (scalar.row, scalar.col)] = 0
            args, kwargs = _with_weight(product, weight, args, kwargs)
        if watch.name in self.replace:
            with torch._C.DisableTorchFunction():
                weight = weight.detach()
                matrix = self.replace[watch.name](weight.T if product.in_out else weight)
                weight = (matrix.T if product.in_out else matrix).to(weight.dtype)
            args, kwargs = _with_weight(product, weight, args, kwargs)
        inputs = _argument(product.inputs, args, kwargs)
        norm = self._norm_of(inputs)
        if norm in self.scales:
            scale = self.scales[norm].to(weight.dtype)
            weight = weight * (scale.unsqueeze(1) if product.in_out else scale)
            args, kwargs = _with_weight(product, weight, args, kwargs)
        result = func(*args, **kwargs)
        if self.record and inputs.numel():
            matrix = weight.T if product.in_out else weight  # [out, in]
            with torch._C.DisableTorchFunction():
                rows = inputs.reshape(-1, matrix.shape[1])
                self._keep(watch, rows, matrix, result.reshape(-1, matrix.shape[0]), norm)
        return result

    def _norm_of(self, inputs: Tensor) -> str:
        """The norm whose output `inputs` is, or a view of; outputs are kept, so their memory is not used twice."""
        memory = inputs.untyped_storage().data_ptr()
        return next((name for name, output in self.norms.items() if output.untyped_storage().data_ptr() == memory), "")

    def _find(self, weight: object) -> Watch | None:
        """The watch whose parameter `weight` is, or is a slice of."""
        if not isinstance(weight, Tensor):
            return None
        name, module = self.inside[-1]
        for watch in self.by_module[name]:
            parameter = module._parameters.get(watch.parameter)
            if parameter is None or parameter.device != weight.device:
                continue
            if weight is parameter and watch.expert is None:
                return watch
            # A view: the transpose that some modules multiply with, or one expert's slice.
            if weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                offset = weight.storage_offset() - parameter.storage_offset()
                if (
                    offset == (watch.expert or 0) * parameter.stride(0)
                    and weight.numel() * _experts(watch, parameter) == parameter.numel()
                ):
                    return watch
        return None

    def _keep(self, watch: Watch, inputs: Tensor, matrix: Tensor, outputs: Tensor, norm: str) -> None:
        inputs, outputs = inputs.to(torch.float32), outputs.to(torch.float32)
        output = _peak(outputs)
        self.linears[watch.name] = LinearRecord(
            input=_peak(inputs),
            output=output,
            energy=_energy(inputs),
            peaks=inputs.abs().amax(dim=0),
            contributions=_explain(inputs, matrix, output) if watch.down else (),
            norm=norm,
        )


def _energy(inputs: Tensor) -> Tensor:
    """float32 [in] of inputs [tokens, in]; tokens that are all zero say nothing."""
    squares = inputs.square()
    totals = squares.sum(dim=1, keepdim=True)
    return (squares / totals.clamp(min=torch.finfo(torch.float32).tiny)).mean(dim=0)


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
    """hidden: [1, tokens, hidden], or a tuple that starts with it."""
    state = (hidden[0] if isinstance(hidden, tuple) else hidden).detach()
    state = state.reshape(-1, state.shape[-1]).to(torch.float32)
    magnitudes = state.abs()
    tokens = magnitudes.argmax(dim=0)
    values = state.gather(0, tokens.unsqueeze(0)).squeeze(0)
    return Residual(values, tokens, magnitudes.median(dim=1).values)


def _watch_norm(watcher: _Watcher, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
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

    watcher = _Watcher(watches, prune, scales or {}, replace or {}, record)
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
