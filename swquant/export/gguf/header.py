"""The keys of a GGUF file: of a GGUF source copied, otherwise made from configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from exporters.errors import SwquantError, first_line
from exporters.gguf.architectures import Architecture, Config, architecture_of
from exporters.gguf.write import MADE_BY, copy_keys
from swquant.checkpoints.base import Checkpoint
from swquant.export.gguf.vocabulary import Vocabulary, add_vocabulary, vocabulary_of
from swquant.version import __version__

__all__ = ["Header"]

# Of the file itself, not of the model in it.
_OWN = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.alignment",
    "swquant.",
    "split.",
    "quantize.",
    "GGUF.",
)


@dataclass(frozen=True)
class Header:
    """What the header says of a model. tokenizer: a GGUF file whose vocabulary is taken, None for the model's own."""

    checkpoint: Checkpoint
    tokenizer: str | None = None

    @cached_property
    def config(self) -> Config:
        """Of the text model, as transformers has completed it."""
        return dict(self.checkpoint.config.get_text_config().to_dict())

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.checkpoint.name, self.config)

    @cached_property
    def _source(self) -> Mapping[str, Any] | None:
        """The header of a GGUF source."""
        if self.checkpoint.kind != "gguf":
            return None
        return _fields(self.checkpoint.files[0])

    @cached_property
    def _vocabulary(self) -> Vocabulary | Mapping[str, Any]:
        if self.tokenizer is not None:
            return _fields(Path(self.tokenizer))
        if self._source is not None:
            return self._source
        return vocabulary_of(self.checkpoint.name, self.checkpoint.tokenizer(), int(self.config["vocab_size"]))

    def check(self) -> None:
        """Raise SwquantError, before any work, for what cannot be said."""
        vocabulary, rows = self._vocabulary, int(self.config["vocab_size"])
        if not isinstance(vocabulary, Vocabulary):
            if "tokenizer.ggml.tokens" not in vocabulary:
                raise SwquantError(
                    f"{self.tokenizer or self.checkpoint.name}: a GGUF file without a vocabulary; take another"
                )
            if self.tokenizer is not None and (count := len(vocabulary["tokenizer.ggml.tokens"].data)) != rows:
                raise SwquantError(
                    f"--tokenizer {self.tokenizer}: has {count} tokens, the embedding of {self.checkpoint.name} {rows} rows; "
                    "take a file of the same model"
                )
        _ = self._keys

    def write(self, writer: gguf.GGUFWriter, file_type: int, options: Mapping[str, Any]) -> None:
        """All keys but the architecture, which the writer has: the model's, then the file's own."""
        writer.kv_data[0].update(self._keys)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_quantized_by("swquant")
        writer.add_string(MADE_BY, __version__)
        writer.add_string("swquant.options", json.dumps(options, sort_keys=True))

    @cached_property
    def _keys(self) -> Mapping[str, Any]:
        """The model's own: made once, when they are checked. A vocabulary takes as long as some of the rounding."""
        writer = gguf.GGUFWriter(None, self.architecture.name)
        if self._source is not None:
            copied = {name: field for name, field in self._source.items() if not name.startswith(_OWN)}
            copy_keys(writer, copied, ("general.", f"{self.architecture.name}."))
        else:
            self._numbers(writer)
        if isinstance(vocabulary := self._vocabulary, Vocabulary):
            add_vocabulary(writer, vocabulary, self.checkpoint.folder)
        else:
            copy_keys(writer, vocabulary, ("tokenizer.",))
        return writer.kv_data[0]

    def _numbers(self, writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.checkpoint.name)
        try:
            self.architecture.write(writer, self.config)
        except KeyError as error:
            raise SwquantError(f"{self.checkpoint.name}: config.json has no {error}, which GGUF files need") from None
        except SwquantError as error:
            raise SwquantError(
                f"{self.checkpoint.name}: {error}; serve the checkpoint with transformers or vLLM"
            ) from None


def _fields(path: Path) -> Mapping[str, Any]:
    try:
        fields: Mapping[str, Any] = gguf.GGUFReader(path).fields
    except Exception as error:  # the package raises nearly everything for what is none
        raise SwquantError(f"{path}: not a readable GGUF file ({first_line(error)}); give another") from None
    return fields
