"""A GGUF file as a checkpoint: tensors decoded one at a time, under their transformers names.

transformers can load GGUF files too, but into a whole model; here its tables (configuration, tokenizer, how
rows were permuted) are used and the gguf package decodes, so a tensor is in memory only while it is
read. Values come as float32: a GGUF block decodes to more digits than 16 bits hold. What is written dense is
bfloat16 unless asked otherwise.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint, Stored, check_depth

__all__ = ["GgufCheckpoint"]

# Computed from the configuration by every loader, so not a weight.
_DERIVED = ("rope_freqs.weight",)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


class GgufCheckpoint(Checkpoint):
    """Reads one .gguf file."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.name = path.stem
        try:
            self._open()
        except SwquantError:
            raise
        except Exception as error:  # struct.error, IndexError, ValueError, …: the header lies
            raise SwquantError(
                f"{path.name}: not a readable GGUF file ({type(error).__name__}: {first_line(error)}); fetch it again, "
                "or convert the model to safetensors with transformers"
            ) from None

    def _open(self) -> None:
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, load_gguf_checkpoint

        if _first_bytes(self.path) != b"GGUF":
            raise SwquantError(f"{self.path.name}: not a GGUF file (it does not begin with GGUF)")
        reader = GGUFReader(self.path)
        parsed = load_gguf_checkpoint(str(self.path))["config"]
        self.config = AutoConfig.for_model(**parsed)
        self.config.dtype = torch.bfloat16
        check_depth(self.name, self.config, len(reader.tensors))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [type(model).__name__]
        self.raw_config = self.config.to_dict()

        architecture = reader.fields["general.architecture"].contents()
        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(known[architecture], self.config.num_hidden_layers)
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
        self._encoded = {tensor.name: tensor for tensor in reader.tensors}
        self._gguf_name: dict[str, str] = {}
        tensors: dict[str, Stored] = {}
        for name, parameter in model.state_dict().items():
            stem, _, suffix = name.rpartition(".")
            gguf_name = f"{names.get_name(stem)}.{suffix}"
            if gguf_name in self._encoded:
                self._gguf_name[name] = gguf_name
                tensors[name] = Stored(torch.float32, tuple(parameter.shape))
        self.tensors = tensors
        if unused := sorted(set(self._encoded) - set(self._gguf_name.values()) - set(_DERIVED)):
            raise SwquantError(
                f"{self.path.name}: {len(unused)} tensors of a {architecture} file have no one-to-one place in "
                f"transformers (first {unused[0]}); convert it with AutoModelForCausalLM.from_pretrained(…, gguf_file=…)"
                ".save_pretrained(…)"
            )
        digest = hashlib.sha256(json.dumps(parsed, sort_keys=True, default=str).encode())
        for tensor in reader.tensors:
            digest.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape} {tensor.data_offset}\n".encode())
        self.fingerprint = digest.hexdigest()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def fills_folder(self) -> bool:
        return False

    @property
    def stores_floats(self) -> bool:
        return False

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        return torch.bfloat16  # nobody wants the decoded float32 on disk

    def read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        encoded = self._encoded[self._gguf_name[name]]
        try:
            values = dequantize(encoded.data, encoded.tensor_type)
            # The table of processors undoes what llama.cpp did to a tensor: permuted rows, norms stored plus one.
            values = self._processor.process(weights=values, name=encoded.name).weights
        except Exception as error:  # an encoding that the package does not know, a shape that lies
            raise SwquantError(
                f"{self.path.name}: {encoded.name} cannot be decoded from {encoded.tensor_type.name} "
                f"({first_line(error)}); take a file in F16, Q8_0 or Q4_K"
            ) from None
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise SwquantError(
                f"{self.path.name}: {encoded.name} has the shape {list(tensor.shape)}, {name} needs "
                f"{list(self.tensors[name].shape)}; the file does not fit its configuration"
            )
        return tensor

    @cached_property
    def _cached_tokenizer(self) -> PreTrainedTokenizerBase:
        # Reading a vocabulary of 262,144 tokens out of a GGUF header takes ten seconds: once is enough.
        return AutoTokenizer.from_pretrained(self.folder, gguf_file=self.path.name)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._cached_tokenizer

    def save_companions(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)

    def close(self) -> None:
        self._encoded = {}
