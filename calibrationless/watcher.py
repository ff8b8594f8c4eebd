"""The interceptor of matrix products: what `probe` watches a forward pass with.

A `TorchFunctionMode` sees every product that torch multiplies, whatever module asked for it, and finds the weight in it
by its storage. So architectures need no hooks of their own, and fused experts are seen one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calibrationless.records import Contribution, LinearRecord, Peak, Scalar, Spike, Watch

__all__ = ["Watcher"]

# How many rows with the largest outputs are kept, and how many of the terms behind each.
_SPIKES = 8
_CONTRIBUTIONS = 8


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


def _spikes(inputs: Tensor, matrix: Tensor, outputs: Tensor, largest: Peak) -> tuple[Spike, ...]:
    """The rows with the largest outputs, largest first, each at the token where it is largest."""
    magnitudes = outputs.abs()
    heights, tokens = magnitudes.max(dim=0)
    peaks = [largest]
    for row in heights.topk(min(_SPIKES, heights.numel())).indices.tolist():
        if row != largest.channel and len(peaks) < _SPIKES:
            token = int(tokens[row])
            peaks.append(Peak(float(outputs[token, row]), token, row, float(magnitudes[token].median())))
    return tuple(Spike(peak, _explain(inputs, matrix, peak)) for peak in peaks)


@dataclass(frozen=True)
class _Product:
    """How a function takes its factors: (position, keyword) of each. in_out: the weight is given as [in, out].

    Where the weight has three dimensions it holds all experts, and each is a product of its own.
    """

    inputs: tuple[int, str]
    weight: tuple[int, str]
    in_out: bool = True


_PRODUCTS: Mapping[Any, _Product] = {
    torch.nn.functional.linear: _Product((0, "input"), (1, "weight"), in_out=False),
    torch.addmm: _Product((1, "mat1"), (2, "mat2")),
    torch.matmul: _Product((0, "input"), (1, "other")),
    torch.mm: _Product((0, "input"), (1, "mat2")),
    torch.bmm: _Product((0, "input"), (1, "mat2")),
    torch.baddbmm: _Product((1, "batch1"), (2, "batch2")),
    torch.Tensor.mm: _Product((0, "self"), (1, "mat2")),
    torch.Tensor.bmm: _Product((0, "self"), (1, "mat2")),
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


def _holds_all_experts(weight: Tensor, parameter: Tensor) -> bool:
    """Whether a view of a 3-D parameter is all of it, with the experts still first."""
    return (
        weight.ndim == 3 and weight.numel() == parameter.numel() and weight.shape[0] == parameter.shape[0]
        and weight.stride(0) == parameter.stride(0)
    )  # fmt: skip


class Watcher(TorchFunctionMode):
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
        given: Tensor = _argument(product.weight, args, kwargs)
        watches = self._find(given)
        if not watches:
            return func(*args, **kwargs)
        inputs = _argument(product.inputs, args, kwargs)
        norm = self._norm_of(inputs)
        weight = self._changed(product, watches, given)
        if norm in self.scales:
            scale = self.scales[norm].to(weight.dtype)
            weight = weight * (scale.unsqueeze(1) if product.in_out else scale)
        if weight is not given:
            args, kwargs = _with_weight(product, weight, args, kwargs)
        result = func(*args, **kwargs)
        if self.record and inputs.numel():
            with torch._C.DisableTorchFunction():
                self._keep_all(watches, inputs, weight.mT if product.in_out else weight, result, norm)
        return result

    def _changed(self, product: _Product, watches: Sequence[Watch], weight: Tensor) -> Tensor:
        """The weight with what `prune` and `replace` ask for; itself where they ask for nothing."""
        if not any(watch.name in self.prune or watch.name in self.replace for watch in watches):
            return weight
        with torch._C.DisableTorchFunction():
            matrix = weight.detach().mT if product.in_out else weight.detach()
            if matrix.ndim == 2:
                matrix = self._changed_matrix(watches[0], matrix)
            else:
                by_expert = {watch.expert: watch for watch in watches}
                matrix = torch.stack([
                    self._changed_matrix(by_expert[expert], one) if expert in by_expert else one
                    for expert, one in enumerate(matrix)
                ])  # fmt: skip
            return matrix.mT if product.in_out else matrix

    def _changed_matrix(self, watch: Watch, matrix: Tensor) -> Tensor:
        """matrix: [out, in]."""
        if watch.name in self.prune:
            # A copy with zeros, rather than a difference of the outputs: exact in every dtype.
            matrix = matrix.clone()
            for scalar in self.prune[watch.name]:
                matrix[scalar.row, scalar.col] = 0
        return self.replace[watch.name](matrix).to(matrix.dtype) if watch.name in self.replace else matrix

    def _norm_of(self, inputs: Tensor) -> str:
        """The norm whose output `inputs` is, or a view of; outputs are kept, so their memory is not used twice."""
        memory = inputs.untyped_storage().data_ptr()
        return next((name for name, output in self.norms.items() if output.untyped_storage().data_ptr() == memory), "")

    def _find(self, weight: object) -> list[Watch]:
        """The watch whose parameter `weight` is, or is a slice of; all experts' watches where it is all of them."""
        if not isinstance(weight, Tensor):
            return []
        name, module = self.inside[-1]
        whole: list[Watch] = []
        for watch in self.by_module[name]:
            parameter = module._parameters.get(watch.parameter)
            if parameter is None or parameter.device != weight.device:
                continue
            if weight is parameter and watch.expert is None:
                return [watch]
            # A view: the transpose that some modules multiply with, or one expert's slice.
            if weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                if watch.expert is not None and _holds_all_experts(weight, parameter):
                    whole.append(watch)
                    continue
                offset = weight.storage_offset() - parameter.storage_offset()
                if (
                    offset == (watch.expert or 0) * parameter.stride(0)
                    and weight.numel() * _experts(watch, parameter) == parameter.numel()
                ):
                    return [watch]
        return whole

    def _keep_all(self, watches: Sequence[Watch], inputs: Tensor, matrix: Tensor, result: Tensor, norm: str) -> None:
        """matrix: [out, in], or [experts, out, in]."""
        if matrix.ndim == 2:
            self._keep(
                watches[0], inputs.reshape(-1, matrix.shape[1]), matrix, result.reshape(-1, matrix.shape[0]), norm
            )
            return
        inputs = inputs.expand(*result.shape[:-1], inputs.shape[-1])
        for watch in watches:
            one = matrix[watch.expert or 0]
            rows = inputs.select(-3, watch.expert or 0).reshape(-1, one.shape[1])
            outputs = result.select(-3, watch.expert or 0).reshape(-1, one.shape[0])
            visits = (rows != 0).any(dim=1)  # a token that was not sent to this expert arrives as zeros
            if bool(visits.any()):
                self._keep(watch, rows[visits], one, outputs[visits], norm)

    def _keep(self, watch: Watch, inputs: Tensor, matrix: Tensor, outputs: Tensor, norm: str) -> None:
        inputs, outputs = inputs.to(torch.float32), outputs.to(torch.float32)
        output, before = _peak(outputs), self.linears.get(watch.name)
        self.linears[watch.name] = LinearRecord(
            input=_peak(inputs),
            output=output,
            energy=_energy(inputs),
            peaks=inputs.abs().amax(dim=0),
            spikes=_spikes(inputs, matrix, outputs, output) if watch.down else (),
            norm=norm,
            products=1 + (before.products if before is not None else 0),
        )


def _energy(inputs: Tensor) -> Tensor:
    """float32 [in] of inputs [tokens, in]; tokens that are all zero say nothing."""
    squares = inputs.square()
    totals = squares.sum(dim=1, keepdim=True)
    return (squares / totals.clamp(min=torch.finfo(torch.float32).tiny)).mean(dim=0)
