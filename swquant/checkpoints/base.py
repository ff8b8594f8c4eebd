"""What the rest of swquant knows of a checkpoint, wherever it comes from.

Tensors are named as the checkpoint stores them, not as modules hold them: transformers 5 fuses the
experts of a mixture into 3-D parameters while loading, so only the stored names say what there is to
compress. `SafetensorsCheckpoint`, `GgufCheckpoint` and `CompressedCheckpoint` are the three kinds;
`open_checkpoint` picks one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from exporters.errors import SwquantError, first_line

__all__ = ["Checkpoint", "Stored", "check_depth"]


@dataclass(frozen=True)
class Stored:
    """Form of a tensor: the dtype that `read` returns it in, and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def check_depth(name: str, config: PreTrainedConfig, tensors: int) -> None:
    """Raise SwquantError where there are more layers than tensors: to build a billion of them would take all memory."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if depth > tensors:
        raise SwquantError(
            f"{name}: the configuration claims {depth} layers, but there are only {tensors} tensors; it belongs to another model"
        )


class Checkpoint(ABC):
    """A model on disk: its configuration, and tensors that are read one at a time.

    name: for people. kind: `safetensors`, `gguf` or `swquant`. fingerprint: sha256 over what identifies the
    source (configuration, headers, sizes), not over every weight.
    """

    kind: str
    name: str
    folder: Path
    config: PreTrainedConfig
    raw_config: dict[str, Any]
    tensors: Mapping[str, Stored]
    fingerprint: str
    trust_remote_code: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from, which no output may replace."""
        return (self.folder / "config.json",)

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, with all its values, in the form that `tensors[name]` announces."""

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises SwquantError where it is missing or damaged."""
        try:
            return self._load_tokenizer()
        except Exception as error:  # transformers raises nearly everything here
            raise SwquantError(
                f"{self.name}: no usable tokenizer ({first_line(error)}); put tokenizer.json beside config.json"
            ) from None

    @abstractmethod
    def save_companions(self, folder: Path) -> None:
        """Write tokenizer, generation configuration and chat template into `folder`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of open files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
