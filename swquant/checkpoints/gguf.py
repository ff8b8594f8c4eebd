"""A GGUF file as a checkpoint: tensors decoded one at a time, under their transformers names.

transformers can load GGUF files too, but into a whole model; here its tables (configuration, tokenizer, how
rows were permuted) are used and the gguf package decodes, so a tensor is in memory only while it is
read. Values come as float32: a GGUF block decodes to more digits than 16 bits hold. What is written dense is
bfloat16 unless asked otherwise.

The file is all there is: it lies among downloads of other models, whose tokenizers and configurations are not its own.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from exporters.errors import SwquantError, first_line
from exporters.text import shown
from swquant.checkpoints.base import Checkpoint, Stored, check_depth
from swquant.checkpoints.gguf_rope import rope_scaling
from swquant.checkpoints.guard import silent_transformers
from swquant.checkpoints.origin import license_id, repository_id
from swquant.scratch import temporary_folder

__all__ = ["GgufCheckpoint"]

# Said by the configuration (see gguf_rope), so not a weight.
_DERIVED = "rope_freqs.weight"
# Where a header names the license, and the repository that the file was made of.
_LICENSE, _SOURCES = "general.license", ("general.source.repo_url", "general.source.huggingface.repository")


def _check_beginning(path: Path) -> None:
    """Raise SwquantError unless a file begins as a GGUF file of this machine's byte order does."""
    with open(path, "rb") as file:
        beginning = file.read(8)
    if beginning[:4] != b"GGUF":
        raise SwquantError(f"{path.name}: not a GGUF file (it does not begin with GGUF)")
    # The version is a small number; in the other byte order its low half is zero.
    if len(beginning) == 8 and beginning[4:6] == b"\0\0" and beginning[6:] != b"\0\0":
        raise SwquantError(
            f"{path.name}: a big-endian GGUF file; take a little-endian one, or convert it with gguf-convert-endian"
        )


def _check_whole(path: Path, fields: Mapping[str, Any], tensors: int) -> None:
    """Raise SwquantError for one of the files that a model was split into."""
    parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
    if parts > 1:
        number = int(fields["split.no"].contents()) + 1 if "split.no" in fields else 1
        raise SwquantError(
            f"{path.name}: part {number} of a model that was split into {parts} files; join them with llama.cpp: "
            f"llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf, then give WHOLE.gguf"
        )
    if "split.tensors.count" in fields and int(fields["split.tensors.count"].contents()) > tensors:
        raise SwquantError(
            f"{path.name}: holds {tensors} of a split model's tensors; join its parts, or fetch it again"
        )


def _check_layout(path: Path, reader: Any) -> None:
    """Raise SwquantError unless the tensors lie end to end behind the header, zeros between them: what llama.cpp
    writes and asks for. A header that lost or won a byte would shift every weight, and all would be numbers still."""
    last, size = reader.tensors[-1].field, len(reader.data)
    ends = [int(last.offset) + sum(int(part.nbytes) for part in last.parts)]
    ends += [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
    starts = [*(int(tensor.data_offset) for tensor in reader.tensors), size]
    names = ["the header", *(tensor.name for tensor in reader.tensors)]
    for name, end, start in zip(names, ends, starts, strict=True):
        aligned = end + -end % reader.alignment
        if not (start == aligned or end <= start == size < aligned) or reader.data[end:start].any():
            raise SwquantError(
                f"{path.name}: {shown(name)} ends at byte {end}, what follows begins at byte {start} of {size}, or zeros are "
                "missing between them; the file is damaged, fetch it again"
            )


class GgufCheckpoint(Checkpoint):
    """Reads one .gguf file."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.name = path.stem
        try:
            with warnings.catch_warnings(), silent_transformers():
                warnings.simplefilter("ignore")  # numpy's, of sums that overflow: the reader then finds no such bytes
                self._open()
        except SwquantError:
            raise
        except Exception as error:  # struct.error, IndexError, ValueError, …: the header lies
            raise SwquantError(
                f"{path.name}: not a readable GGUF file ({type(error).__name__}: {first_line(error)}); fetch it again, "
                "or convert the model to safetensors with transformers"
            ) from None

    def _open(self) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        from swquant.checkpoints.gguf_header import Header, config_by_transformers

        _check_beginning(self.path)
        reader = Header(self.path)
        _check_whole(self.path, reader.fields, len(reader.tensors))
        _check_layout(self.path, reader)
        self._encoded = {tensor.name: tensor for tensor in reader.tensors}
        self._has_vocabulary = "tokenizer.ggml.tokens" in reader.fields
        stated = {key: reader.fields[key].contents() for key in (_LICENSE, *_SOURCES) if key in reader.fields}
        self._license = license_id(stated.get(_LICENSE))
        self._repository = next(filter(None, (repository_id(stated.get(key)) for key in _SOURCES)), None)
        self._bytes, self._parsed = reader.mapped.data, config_by_transformers(self.path, reader)
        parsed = dict(self._parsed)
        if (scaling := self._rope_scaling(reader.fields, parsed)) is not None:
            parsed["rope_scaling"] = scaling
        self.config = AutoConfig.for_model(**parsed)
        self.config.dtype = torch.bfloat16
        check_depth(self.name, self.config, len(reader.tensors))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        self.config.architectures = [type(model).__name__]
        self.raw_config = self.config.to_dict()

        architecture = reader.fields["general.architecture"].contents()
        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(known[architecture], self.config.num_hidden_layers)
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
        self._gguf_name: dict[str, str] = {}
        tensors: dict[str, Stored] = {}
        for name, parameter in model.state_dict().items():
            stem, _, suffix = name.rpartition(".")
            gguf_name = f"{names.get_name(stem)}.{suffix}"
            if gguf_name in self._encoded:
                self._gguf_name[name] = gguf_name
                tensors[name] = Stored(torch.float32, tuple(parameter.shape))
        self.tensors = tensors
        if unused := sorted(set(self._encoded) - set(self._gguf_name.values()) - {_DERIVED}):
            raise SwquantError(
                f"{self.path.name}: {len(unused)} tensors of a {architecture} file have no one-to-one place in "
                f"transformers (first {unused[0]}); convert it with AutoModelForCausalLM.from_pretrained(…, gguf_file=…)"
                ".save_pretrained(…)"
            )
        digest = hashlib.sha256(json.dumps(parsed, sort_keys=True, default=str).encode())
        for tensor in reader.tensors:
            digest.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape} {tensor.data_offset}\n".encode())
        self.fingerprint = digest.hexdigest()

    def _rope_scaling(self, fields: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, Any] | None:
        from swquant.checkpoints.gguf_header import decoded

        if "rope_scaling" in parsed or "rope_parameters" in parsed:  # transformers read it
            return None
        prefix = f"{fields['general.architecture'].contents()}.rope."
        header = {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}
        stored = self._encoded.get(_DERIVED)
        factors = None if stored is None else decoded(stored).astype(np.float32).ravel()
        return rope_scaling(self.path.name, header, parsed, factors)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def fills_folder(self) -> bool:
        return False

    @property
    def repository(self) -> str | None:
        return self._repository

    @property
    def license(self) -> str | None:
        return self._license

    @property
    def stores_floats(self) -> bool:
        return False

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        return torch.bfloat16  # nobody wants the decoded float32 on disk

    def read(self, name: str) -> torch.Tensor:
        from swquant.checkpoints.gguf_header import decoded

        encoded = self._encoded[self._gguf_name[name]]
        try:
            values = decoded(encoded)
            # The table of processors undoes what llama.cpp did to a tensor: permuted rows, norms stored plus one.
            values = self._processor.process(weights=values, name=encoded.name).weights
        except Exception as error:  # an encoding that the package does not know, a shape that lies
            raise SwquantError(
                f"{self.path.name}: {encoded.name} cannot be decoded from {encoded.tensor_type.name} "
                f"({first_line(error)}); take a file in F16, Q8_0 or Q4_K"
            ) from None
        tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # a copy of what is the map still
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise SwquantError(
                f"{self.path.name}: {encoded.name} has the shape {list(tensor.shape)}, {name} needs "
                f"{list(self.tensors[name].shape)}; the file does not fit its configuration"
            )
        return tensor

    @property
    def generation(self) -> dict[str, Any]:
        return {}  # a generation_config.json beside the file is another model's

    @cached_property
    def _cached_tokenizer(self) -> PreTrainedTokenizerBase:
        from swquant.checkpoints.gguf_header import shared

        # A folder that holds nothing else, because transformers prefers what lies beside the file.
        with temporary_folder("gguf") as folder, shared(self.path, self._bytes, self._parsed):
            (folder / "model.gguf").symlink_to(self.path.resolve())
            return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf", trust_remote_code=False)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if not self._has_vocabulary:
            raise SwquantError(
                f"{self.path.name}: a GGUF file without a vocabulary, and files beside it are not read; take one that has "
                "it, or start from the model's safetensors folder"
            )
        return self._cached_tokenizer

    def save_companions(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)

    def close(self) -> None:
        self._encoded = {}
