"""The header of a GGUF file, read once: the gguf package's reader over plain arrays, shared with transformers.

A vocabulary is most of a header: some hundred thousand strings, each with its length. The package slices a
`numpy.memmap` for every one, which costs ten times what slicing an array does, and transformers reads the file again
for the configuration and for the tokenizer. Here its own functions are handed what was read already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import modeling_gguf_pytorch_utils as theirs

__all__ = ["Header", "parsed_by_transformers", "shared"]

_LOCK = threading.Lock()  # transformers' functions are replaced for a moment


class Header(gguf.GGUFReader):
    """The package's reader. Little-endian files only."""

    _plain: np.ndarray | None = None

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if self._plain is None:
            self._plain = np.asarray(self.data)  # the same bytes, without the subclass
        count = int(count)
        end = offset + np.dtype(dtype).itemsize * count
        return self._plain[offset:end].view(dtype)[:count]


def parsed_by_transformers(path: Path, header: Header) -> dict[str, Any]:
    """What transformers makes of the header: `config`, `tokenizer` and more, by its own table of names."""
    with _replaced(gguf, "GGUFReader", lambda *_: header):
        parsed: dict[str, Any] = theirs.load_gguf_checkpoint(str(path))
    return parsed


@contextmanager
def shared(path: Path, parsed: dict[str, Any]) -> Iterator[None]:
    """While it is open, transformers is given `parsed` where it would read this file again."""
    original, file = theirs.load_gguf_checkpoint, path.resolve()

    def load(asked: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(asked).resolve() == file and not options.get("return_tensors"):
            return deepcopy(parsed)
        return original(asked, *arguments, **options)

    with _replaced(theirs, "load_gguf_checkpoint", load):
        yield


@contextmanager
def _replaced(module: Any, name: str, new: Any) -> Iterator[None]:
    with _LOCK:
        original = getattr(module, name)
        setattr(module, name, new)
        try:
            yield
        finally:
            setattr(module, name, original)
