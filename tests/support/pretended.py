"""A GPU that is none: tensors that say they lie on a device of their own and hold their values in the CPU's memory.

Inside `pretended_gpu()` torch can make such tensors and compute with them, in the CPU's arithmetic, and refuses what a
real GPU refuses: an operation that mixes them with tensors of the CPU. So code for any device runs without one, and
a tensor that was made in the wrong place is found. What it cannot show: other rounding, other memory, speed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# The place that torch keeps for devices of others; the one of CUDA is closed where torch was built without it. Beside a
# real GPU nothing is pretended: autograd knows two kinds of streams there, and stops.
_REAL = torch.cuda.is_available()
if not _REAL:
    _setup_privateuseone_for_python_backend("pretended")
GPU = torch.device("cuda" if _REAL else "pretended", 0)
_aten = torch.ops.aten
# They may read tensors of the CPU beside those of a GPU: copies, and indices.
_MIXED = {
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
}


class _OnGpu(Tensor):
    """held: the values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *_: object, **__: object) -> str:
        return f"pretended({self.held!r})"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, form = tree_flatten((args, kwargs))
    ours = [value for value in flat if isinstance(value, _OnGpu)]
    theirs = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, _OnGpu)]
    if torch.Tag.pointwise in func.tags:  # these read numbers of the CPU, and write none
        theirs = [value for value in theirs if value.dim()]
    if ours and theirs and func not in _MIXED:
        raise RuntimeError(f"{func}: tensors on the GPU and on the CPU")
    device = kwargs.get("device")
    goes = torch.device(device).type == GPU.type if device is not None else isinstance(_first(args), _OnGpu)
    if not ours and not goes:
        return func(*args, **kwargs)
    held = [value.held if isinstance(value, _OnGpu) else value for value in flat]
    args, kwargs = tree_unflatten(held, form)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
    result = func(*args, **kwargs)
    known = {id(value.held): value for value in ours}
    if not goes:
        return result

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else _OnGpu(value)

    return tree_map(wrapped, result)


def _first(args: Any) -> Any:
    """The tensor whose device decides: the first, of a list the list's first."""
    tensors = [value for value in tree_flatten(args)[0] if isinstance(value, Tensor)]
    return next((value for value in tensors if value.dim()), tensors[0] if tensors else None)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """The device whose tensors can be made and used inside. Where there is a real one, the test is skipped."""
    if _REAL:
        pytest.skip("a real GPU is here: tests/swquant/test_on_gpu.py")
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **how: Any) -> Tensor:
        """torch makes this one without asking the mode."""
        return made(data, **how).to(GPU) if device == GPU else made(data, device=device, **how)

    begun = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        """A mode is its thread's own."""
        run = thread.run

        def inside() -> None:
            with _Mode():
                run()

        thread.run = inside  # type: ignore[method-assign]
        begun(thread)

    with _Mode(), mock.patch.object(torch, "tensor", tensor), mock.patch.object(threading.Thread, "start", start):
        yield GPU
