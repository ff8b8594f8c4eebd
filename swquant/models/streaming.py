"""A model whose modules read their weights from the checkpoint when they run, and let go of them afterwards.

transformers and accelerate can leave weights in files, too. But they map the files, so that every page that was read
counts as resident, a whole shard at the end; where transformers rearranges tensors while loading (experts that are
stored one by one and held in one tensor) they make the whole tensor in memory, several times; and what a module takes
of another one (`self.mlp.w1`, `self.router.weight`) they do not read at all. Here:

    a weight    is read with plain reads when somebody asks for it, cast, and held until the innermost module that is
                running then has run
    experts     are brought together in a file of the temporary folder, one expert at a time, and that file is mapped:
                only those become resident that a token is sent to, and the kernel takes them back when it needs memory
    otherwise   (no module is running, or somebody looks at all parameters) a weight has its shape, its dtype and four
                bytes: it is NaN all over, so that no number can come of it

Names and shapes must have been compared before (`loading.offloaded_model` does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint
from swquant.models.converted import Conversion, sources

__all__ = ["stream"]

_LARGE = 1 << 26  # bytes of a cast tensor of experts from which on it goes through a file

Read = Callable[[], Tensor]


class _Running(threading.local):
    """Which modules are running, and what was read for each of them. Every thread runs modules of its own."""

    def __init__(self) -> None:
        self.held: list[list[tuple[_Weights, str]]] = []

    def enter(self, *_: Any) -> None:
        self.held.append([])

    def leave(self, *_: Any) -> None:
        for weights, name in self.held.pop():
            del weights.read[name]


class _Weights(dict[str, nn.Parameter | None]):
    """The parameters of a module: they look like those of any other, and are read when they are asked for by name."""

    def __init__(self, known: Mapping[str, nn.Parameter | None], reads: Mapping[str, Read], running: _Running) -> None:
        super().__init__(known)
        self._reads, self._running = reads, running
        self.read: dict[str, nn.Parameter] = {}

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name not in self._reads or not self._running.held:
            return super().__getitem__(name)
        if name not in self.read:
            self.read[name] = nn.Parameter(self._reads[name](), requires_grad=False)
            self._running.held[-1].append((self, name))
        return self.read[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What `[]` gives, which dict's own `get` does not ask."""
        try:
            return self[name]
        except KeyError:
            return default


def stream(checkpoint: Checkpoint, empty: PreTrainedModel, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """The model that runs. empty: it, on the meta device. folder: for experts brought together."""
    model = _with_buffers(empty, dtype)
    reads, running = _reads(checkpoint, model, folder), _Running()
    nothing: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = {name: value for name, value in module._parameters.items() if value is not None}
        for value in own.values():
            if id(value) not in nothing:
                nan = torch.full((), torch.nan, dtype=value.dtype).expand(value.shape)
                nothing[id(value)] = nn.Parameter(nan, requires_grad=False)
        known = {name: value if value is None else nothing[id(value)] for name, value in module._parameters.items()}
        module._parameters = _Weights(known, {name: reads[id(value)] for name, value in own.items()}, running)
        module.register_forward_pre_hook(running.enter)
        module.register_forward_hook(running.leave, always_call=True)
    return model


def _reads(checkpoint: Checkpoint, model: PreTrainedModel, folder: Path) -> dict[int, Read]:
    """How each parameter is read, by its id, since tied ones have several names. Buffers are read at once."""
    found, converters = sources(checkpoint.tensors, model)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    reads: dict[int, Read] = {}
    for target, stored in found.items():
        name, pattern = stored[0]
        if target not in wanted:
            with suppress(AttributeError):  # nobody takes it
                model.get_buffer(target).copy_(checkpoint.read(name))
            continue
        parameter, path = wanted[target], folder / f"{target}.bin"
        if pattern is None:
            reads[id(parameter)] = _reading(checkpoint, name, parameter, path)
        else:
            merge = Conversion(converters[pattern], target, tuple((part, of) for part, of in stored if of), model)
            reads[id(parameter)] = partial(
                _through_file, path, parameter, partial(_experts, checkpoint, merge, parameter)
            )
    return reads


def _with_buffers(empty: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model anew: its parameters without memory, its buffers with the values that its constructor computes."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False):
            model: Any = type(empty)(empty.config)
        model.tie_weights()  # inside, every assignment makes a parameter of its own
        return model.eval()
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(f"transformers cannot build this model without its weights ({first_line(error)})") from None
    finally:
        torch.set_default_dtype(before)


def _reading(checkpoint: Checkpoint, name: str, parameter: nn.Parameter, path: Path) -> Read:
    """How a stored tensor is read."""
    dtype, stored = parameter.dtype, checkpoint.tensors[name]
    if parameter.ndim == 3 and stored.dtype != dtype and parameter.numel() * dtype.itemsize >= _LARGE:
        return partial(_through_file, path, parameter, lambda: iter(checkpoint.read(name)))
    return lambda: checkpoint.read(name).to(dtype)


def _experts(checkpoint: Checkpoint, merge: Conversion, parameter: nn.Parameter) -> Iterator[Tensor]:
    """What transformers makes of the stored experts, one after the other."""
    by_pattern: dict[str, list[str]] = {}
    for name, pattern in merge.sources:
        by_pattern.setdefault(pattern, []).append(name)
    for names in zip(*by_pattern.values(), strict=True):
        one = Conversion(merge.converter, merge.target, tuple(zip(names, by_pattern, strict=True)), merge.model)
        made = one.run({name: checkpoint.read(name).to(parameter.dtype) for name in names})[merge.target]
        yield from made


def _through_file(path: Path, parameter: nn.Parameter, parts: Callable[[], Iterator[Tensor]]) -> Tensor:
    """A mapped tensor [experts, …], its file written where it is not yet there."""
    if not path.exists():
        try:
            with open(path, "wb") as file:
                for part in parts():
                    file.write(part.to(parameter.dtype).contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise SwquantError(
                f"{path.parent}: {error.strerror}; --low-memory puts experts there: set TMPDIR"
            ) from None
    flat = torch.from_file(str(path), shared=False, size=parameter.numel(), dtype=parameter.dtype)
    return flat.view(parameter.shape)
