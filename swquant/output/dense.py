"""A dense model as an ordinary Hugging Face folder, written tensor by tensor: what students and mixtures are.

What compress writes has layouts, patches and a manifest; this has weights, config.json and what lies beside them, so
that every loader takes it; of a mixture also the file that is its architecture. It appears whole or not at all. What
was written is listed with its hashes: `--overwrite` replaces such a folder only as long as nobody trained it further.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import swquant.pr_moe
from exporters.json_file import write_json
from exporters.safetensors_file import SafetensorsWriter
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.output.contents import write_files
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.pr_moe import AUTO_MAP, CODE, PrMoeConfig
from swquant.progress import Progress, silent

__all__ = ["Written", "dense_folder", "nbytes_of", "stored_form", "with_dtype", "write_weights"]

_SHARD = 5_000_000_000  # bytes of one file of weights


@dataclass(frozen=True)
class Written:
    """A tensor to be written: its form, and how it is made when its turn comes."""

    form: Stored
    make: Callable[[], Tensor]


def nbytes_of(tensors: Mapping[str, Written]) -> int:
    """Bytes of all weights."""
    return sum(item.form.nbytes for item in tensors.values())


@contextmanager
def dense_folder(
    checkpoint: Checkpoint,
    out: Path,
    tensors: Mapping[str, Written],
    config: Mapping[str, Any],
    record: tuple[str, Mapping[str, Any]],
    progress: Progress = silent,
    *,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write everything, give the hidden folder to be checked, and put it in its place if the block ends well.

    checkpoint: what it was made of, whose tokenizer and other companions are copied. config: what config.json will
    hold. record: (name below swquant/, how it was made). Raises SwquantError; then `out` does not exist.
    """
    check_destination(out, overwrite, checkpoint)
    size = nbytes_of(tensors)
    check_space(out, size)
    with writing(out, size), unfinished(out) as folder:
        write_weights(folder, tensors, progress)
        checkpoint.save_companions(folder)
        if config["model_type"] == PrMoeConfig.model_type:
            config = {**config, "auto_map": AUTO_MAP}
            shutil.copyfile(swquant.pr_moe.__file__, folder / CODE)
        write_json(folder / "config.json", config, constants=True)
        (folder / "swquant").mkdir(exist_ok=True)
        name, content = record
        write_json(folder / "swquant" / name, content)
        yield folder
        write_files(folder)
        replace(folder, out, overwrite)


def write_weights(folder: Path, tensors: Mapping[str, Written], progress: Progress) -> None:
    """Shards of at most 5 GB, and their index, in the place of those that lie there."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, item in tensors.items():
        if shards[-1] and filled + item.form.nbytes > _SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += item.form.nbytes
    where: dict[str, str] = {}
    with progress.bytes("Writing", nbytes_of(tensors)) as bar:
        for index, names in enumerate(shards, start=1):
            file = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            forms = [(name, tensors[name].form.dtype, tensors[name].form.shape) for name in names]
            writer = SafetensorsWriter(folder / file, forms, {"format": "pt"})
            try:
                for name in names:
                    writer.write(name, tensors[name].make().to(tensors[name].form.dtype))
                    bar.advance(name, tensors[name].form.nbytes)
                writer.finish()
            finally:
                writer.close()
            where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_of = {"metadata": {"total_size": nbytes_of(tensors)}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index_of)


def with_dtype(config: Mapping[str, Any], tensors: Mapping[str, Written]) -> dict[str, Any]:
    """A configuration that says the dtype that most tensors are written as."""
    forms = [item.form.dtype for item in tensors.values() if item.form.dtype.is_floating_point]
    named = str(max(forms, key=forms.count)).removeprefix("torch.")
    said = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": named}
    if "text_config" in said:
        said["text_config"] = {**said["text_config"], "dtype": named}
    return said


def stored_form(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Stored:
    """The form in which an unrounded tensor is written, with another shape if that is given."""
    stored = checkpoint.tensors[name]
    dtype = checkpoint.dense_dtype(stored) if stored.dtype.is_floating_point else stored.dtype
    return Stored(dtype, stored.shape if shape is None else shape)
