"""Several forward passes of one model, carried through it side by side, one decoder layer at a time.

A pass of many texts over a model larger than memory wants to read every layer once, not once per batch of texts.
Calling the layers by hand would need to know what each architecture hands them: masks, rotary embeddings, inputs of
their own, what an earlier layer left for a later one. So nobody calls them by hand. Every batch runs the model's own
`forward`, in a thread of its own, and is held at a gate in front of each layer until all batches stand there:

    batch 0   embed · gate · layer 0 · gate          · layer 1 · …
    batch 1                  embed · gate · layer 0 · gate     · layer 1 · …

One thread runs at a time, always in the same order: the turn is handed on, nothing is shared out. What a batch computes
is what it would compute alone, bit for bit, and what waits is what its `forward` holds: its hidden states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["SideBySide", "side_by_side"]


class _CancelledError(Exception):
    """Unwinds a pass that nobody wants the end of."""


class _Pass(threading.Thread):
    """One forward pass. `layer`: the one that it stands in front of, or runs; None before the first and at the end."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._forward = run
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self._error: BaseException | None = None
        self.layer: int | None = None
        self.ended = False

    def run(self) -> None:
        try:
            self._turn.acquire()
            with torch.no_grad():  # of this thread: the other's setting does not reach here
                if not self._cancelled:
                    self._forward()
        except _CancelledError:
            pass
        except BaseException as error:  # it is raised where the turn came from
            self._error = error
        finally:
            self.layer, self.ended = None, True
            self._back.release()

    def go_on(self) -> None:
        """Run to the next gate or to the end, while the caller waits. Raises what the pass raised."""
        if not self.ended:
            self._turn.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error

    def gate(self, layer: int) -> None:
        """In the pass's own thread, in front of every module of a layer: wait if it is another than the last one."""
        if self._cancelled:
            raise _CancelledError
        if layer != self.layer:
            self.layer = layer
            self._back.release()
            self._turn.acquire()
            if self._cancelled:
                raise _CancelledError

    def cancel(self) -> None:
        """End it wherever it is: at once at a gate, at the next module where it runs (after Ctrl-C it may)."""
        self._cancelled = True
        if self.ident is not None and not self.ended:
            self._turn.release()
            self.join()


class SideBySide:
    """Passes that stand in front of the same layer, all of them. Made by `side_by_side`."""

    def __init__(self, passes: Sequence[_Pass]) -> None:
        self._passes = passes
        self._done: set[int] = set()

    def step(self) -> bool:
        """Carry every pass through the layer that it stands in front of; at first, up to the first layer. False where
        all were at their end already."""
        if all(one.ended for one in self._passes):
            return False
        self._done |= {one.layer for one in self._passes if one.layer is not None}
        for one in self._passes:
            one.go_on()
        return True

    def has_run(self, layer: int) -> bool:
        """Whether the passes have been through a layer."""
        return layer in self._done


@contextmanager
def side_by_side(
    model: nn.Module, layers: Sequence[Sequence[str]], runs: Sequence[Callable[[], object]]
) -> Iterator[SideBySide]:
    """runs: each is one forward pass of `model`. layers: of every layer, the names of the modules that are it.

    Passes that are run in other ways meanwhile see no gates. Afterwards no pass is running and no gate stands.
    """
    passes = [_Pass(run) for run in runs]

    def gate_of(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gate(module: nn.Module, args: tuple[Any, ...]) -> None:
            here = threading.current_thread()
            if isinstance(here, _Pass) and here in passes:
                here.gate(layer)

        return gate

    with ExitStack() as stack:
        for index, names in enumerate(layers):
            for name in names:  # all modules inside, too: some models call parts of a layer, and never the layer
                for module in model.get_submodule(name).modules():
                    stack.callback(module.register_forward_pre_hook(gate_of(index)).remove)
        for one in passes:
            stack.callback(one.cancel)
            one.start()
        yield SideBySide(passes)
