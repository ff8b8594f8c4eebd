"""What the rest of swquant knows of a checkpoint, wherever it comes from.

    ModelFolder               configuration, tokenizer, fingerprint: what can be run
      OnnxFolder              a graph instead of tensors
      Checkpoint              tensors, read one at a time
        SafetensorsCheckpoint, GgufCheckpoint, CompressedCheckpoint

`open_model` opens any of them, `open_checkpoint` one that has tensors. What differs between them is a property that
asks the question (`stores_floats`, `is_compressed`, …), not a name to compare.

Tensors are named as the checkpoint stores them, not as modules hold them: transformers 5 fuses the
experts of a mixture into 3-D parameters while loading, so only the stored names say what there is to
compress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from exporters.errors import SwquantError
from swquant.checkpoints.generation import GENERATION, read_generation
from swquant.checkpoints.guard import failures_of, silent_stdout, silent_transformers
from swquant.checkpoints.origin import cached_repository, front_matter, license_id
from swquant.checkpoints.schema import SourceKind

__all__ = ["Checkpoint", "ModelFolder", "Stored", "check_depth"]


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


class ModelFolder(ABC):
    """A model on disk that can be run: its configuration and its tokenizer.

    name: for people. fingerprint: sha256 over what identifies the source (configuration, headers, sizes), not over
    every weight.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    raw_config: dict[str, Any]
    fingerprint: str
    trust_remote_code: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from, which no output may replace."""
        return (self.folder / "config.json",)

    @property
    def fills_folder(self) -> bool:
        """Whether all of `folder` is this model, so that no output may lie inside."""
        return True

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises SwquantError where it is missing or damaged."""
        with (
            failures_of(f"{self.name}: no usable tokenizer", "put tokenizer.json beside config.json"),
            silent_stdout(),
            silent_transformers(),  # it reads config.json, too
        ):
            return self._load_tokenizer()

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json says of how the model is to be asked, {} where there is none."""
        path = self.folder / GENERATION
        return read_generation(path) if path.is_file() else {}

    @property
    def repository(self) -> str | None:
        """OWNER/NAME of the original on the hub, None where nothing says so."""
        return cached_repository(self.folder)

    @property
    def license(self) -> str | None:
        """The license, as the hub calls it, that the model's own card names; None where there is none."""
        return license_id(front_matter(self.folder).get("license"))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text. Raises SwquantError where they are no ids."""
        ids = self.generation.get("eos_token_id")
        if ids is None:
            ids = getattr(self.config.get_text_config(), "eos_token_id", None)
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(isinstance(token, int) for token in ids):
            raise SwquantError(
                f"{self.name}: config.json has the eos_token_id {str(ids)[:60]}; it is an id or a list of ids"
            )
        return tuple(ids)

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


class Checkpoint(ModelFolder):
    """A model whose tensors can be read one at a time. kind: what a manifest calls it."""

    kind: ClassVar[SourceKind]
    tensors: Mapping[str, Stored]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, with all its values, in the form that `tensors[name]` announces."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the source, one line each, beside what is done with it."""
        return ()

    @property
    def is_compressed(self) -> bool:
        """Whether swquant made it, so that there is nothing left to compress."""
        return False

    @property
    def stores_floats(self) -> bool:
        """Whether its files hold the floats that `read` gives, and not something that they are decoded from."""
        return True

    @property
    def can_stay_on_disk(self) -> bool:
        """Whether transformers can run it with the weights left in their files."""
        return False

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        """What the unrounded values of a tensor of floats are written as, unless an option says otherwise."""
        return stored.dtype
