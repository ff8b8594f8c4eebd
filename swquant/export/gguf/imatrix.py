"""The energy of one prompt as an importance matrix of llama.cpp, for `llama-quantize --imatrix`.

llama.cpp counts the square of every input over a calibration text; here it is what the one prompt showed, for which no
text is read. A file that ends in .gguf is llama.cpp's present format (sums and counts of every tensor), one in .dat its
old one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from exporters.errors import SwquantError
from exporters.gguf.names import Place
from swquant.compress.prepared import Prepared
from swquant.output.destination import write_whole, writing
from swquant.output.hidden import locked_file

__all__ = ["check_imatrix", "energies", "write_imatrix"]

_SUFFIXES = (".gguf", ".dat")


def check_imatrix(name: str) -> None:
    """Raise SwquantError for a file that cannot be written."""
    path = Path(name)
    if path.suffix not in _SUFFIXES:
        raise SwquantError(
            f"--imatrix {name}: ends in .gguf (llama.cpp's present format) or .dat (its old one); rename it"
        )
    if not path.resolve().parent.is_dir():
        raise SwquantError(f"--imatrix {name}: its folder does not exist; create it first")


def energies(prepared: Prepared, places: Sequence[Place]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name in the file -> (float32 [matrices, in], counts float32 [matrices]); 0 counts where nothing was seen."""
    tokens, found = float(len(prepared.found.token_ids)), {}
    weights = prepared.found.architecture.weights
    for place in places:
        if not all(name in weights for name in place.sources):
            continue
        seen = [prepared.found.energy(name) for name in place.sources]
        known = next((energy for energy in seen if energy is not None), None)
        if known is None:
            continue
        sums = torch.stack([torch.zeros_like(known) if energy is None else energy * tokens for energy in seen])
        counts = torch.tensor([0.0 if energy is None else tokens for energy in seen])
        found[place.name] = (sums.to(torch.float32), counts)
    return found


def write_imatrix(path: Path, prepared: Prepared, places: Sequence[Place]) -> None:
    """Write the prompt's energy. Raises SwquantError where the file cannot be written."""
    content, prompt = energies(prepared, places), prepared.found.prompt
    with writing(path, option="--imatrix"):
        if path.suffix == ".dat":
            write_whole(path, _legacy(content, prompt))
            return
        with locked_file(path.resolve()) as (partial, _):
            _write(partial, content, prompt, len(prepared.found.token_ids))
            partial.replace(path)


def _write(path: Path, content: Mapping[str, tuple[Tensor, Tensor]], prompt: str, tokens: int) -> None:
    writer = gguf.GGUFWriter(path, "")  # of no architecture: it is no model
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [f"one prompt: {prompt}"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", tokens)
    for name, (sums, counts) in content.items():
        writer.add_tensor(f"{name}.in_sum2", sums.numpy())
        writer.add_tensor(f"{name}.counts", counts.unsqueeze(1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _legacy(content: Mapping[str, tuple[Tensor, Tensor]], prompt: str) -> bytes:
    """Little-endian: the number of entries; each a name, its calls, its values times calls; then calls and the text."""
    parts = [struct.pack("<i", len(content))]
    for name, (sums, counts) in content.items():
        key, calls = name.encode(), max(1, int(counts.max()))
        values = (sums / counts.clamp(min=1).unsqueeze(1) * calls).numpy().astype("<f4").reshape(-1)
        parts += [
            struct.pack("<i", len(key)),
            key,
            struct.pack("<ii", calls, values.size),
            np.ascontiguousarray(values).tobytes(),
        ]
    text = f"one prompt: {prompt}".encode()
    return b"".join([*parts, struct.pack("<ii", 1, len(text)), text])
