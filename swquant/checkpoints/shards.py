"""Which safetensors files make up the model in a folder, and which of them holds a tensor.

One file, `model.safetensors`, or several with an index beside them. The index is the word on where a tensor is: mergers
and converters leave tensors in two shards, and only one of them is meant. Where a folder holds both forms, one is a
leftover of an earlier save, and nothing in the folder says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os.path import isfile  # unlike Path.is_file, no error for a name that is too long
from pathlib import Path

from exporters.errors import SwquantError
from exporters.json_file import read_json

__all__ = ["INDEX", "SINGLE", "holders", "shard_names"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def shard_names(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the model in `folder`, checked against its index."""
    if not isfile(folder / INDEX):
        if isfile(folder / SINGLE):
            return (SINGLE,)
        raise _no_weights(folder)
    names = tuple(sorted(set(_weight_map(folder).values())))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or not name.endswith(".safetensors"):
            raise SwquantError(
                f"{folder / INDEX}: {name!r} is not the name of a safetensors file beside it; fetch or save the model again"
            )
    if isfile(folder / SINGLE) and SINGLE not in names:
        raise SwquantError(
            f"{folder.name}: two sets of weights, {SINGLE} and the {len(names)} shards that {INDEX} names, and loaders "
            f"disagree which they read; delete {SINGLE}, or {INDEX} with its shards, whichever is older"
        )
    if missing := [name for name in names if not isfile(folder / name)]:
        raise SwquantError(
            f"{folder.name}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; fetch the model again"
        )
    return names


def holders(folder: Path, name: str, shards: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Tensor -> the shard to read it from: the one that the index says, where several hold it.

    name: of the model, for messages. shards: file -> names of the tensors in it. Raises SwquantError where the index
    promises what is not there, or leaves open which of two is meant.
    """
    held = {shard: set(tensors) for shard, tensors in shards.items()}
    listed = _weight_map(folder) if isfile(folder / INDEX) else {}
    if lost := sorted(tensor for tensor, shard in listed.items() if tensor not in held.get(shard, ())):
        raise SwquantError(
            f"{name}: the index promises {lost[0]} in {listed[lost[0]]}, which does not hold it; fetch the model again"
        )
    where: dict[str, str] = {}
    for shard, tensors in shards.items():
        for tensor in tensors:
            if tensor in where and tensor not in listed:
                raise SwquantError(
                    f"{name}: {tensor} is in {where[tensor]} and in {shard}, and {INDEX} names neither; fetch the model again"
                )
            where[tensor] = listed.get(tensor, shard)
    return where


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SwquantError(f"{folder / INDEX}: weight_map is not a table of names; fetch or save the model again")
    return weight_map


def _no_weights(folder: Path) -> SwquantError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return SwquantError(
            f"{folder.name}: only pickle weights ({pickles[0]}), which can run code when opened; load the model in "
            "transformers where you trust it and save it again with save_pretrained()"
        )
    return SwquantError(
        f"{folder.name}: no {SINGLE} and no {INDEX}; give a folder saved by save_pretrained(), or a .gguf file"
    )
