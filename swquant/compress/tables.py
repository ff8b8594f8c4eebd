"""The embedding and the output head: `--embedding-bits`, `--lm-head-bits`, and what a plan makes of them.

They are the tables of a model, a row for each token. Small models spend half of their bytes on them, and what rounding
them costs goes straight into every prediction: they stay as they are unless asked for. A tied model has one table for
both, stored once; either option names it. Both are rounded with the energy that the head's inputs have on the prompt:
at 4 bits that halves the divergence that a tied table costs.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import nn

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.compress.options import CompressOptions
from swquant.models.architecture import Architecture
from swquant.models.stock import empty_model, table_modules

__all__ = ["EMBEDDING", "HEAD", "TIED", "Table", "tables_of", "tied_copies"]

EMBEDDING, HEAD = "embedding", "output head"
TIED = f"{EMBEDDING} and {HEAD}"


@dataclass(frozen=True)
class Table:
    """A table that is to be rounded. role: what it is to the model, for people. asked: the option, as it was typed."""

    bits: int
    role: str
    asked: str


def tables_of(
    checkpoint: Checkpoint, architecture: Architecture, options: CompressOptions, left_out: Container[str]
) -> dict[str, Table]:
    """Stored name -> the table that options want rounded. left_out: stored tensors that are not written. Raises
    SwquantError where there is none, and where one table is asked for in two ways."""
    bits = {EMBEDDING: options.embedding_bits, HEAD: options.lm_head_bits}
    asked = {EMBEDDING: f"--embedding-bits {bits[EMBEDDING]}", HEAD: f"--lm-head-bits {bits[HEAD]}"}
    names = {EMBEDDING: architecture.embedding, HEAD: architecture.head}
    if names[HEAD] in left_out:
        names[HEAD] = names[EMBEDDING]
    roles = [role for role in (EMBEDDING, HEAD) if bits[role]]
    if len(roles) == 2 and names[EMBEDDING] == names[HEAD] and bits[EMBEDDING] != bits[HEAD]:
        raise SwquantError(
            f"{asked[EMBEDDING]} and {asked[HEAD]} contradict each other: {checkpoint.name} has one table for both; give "
            "one of them"
        )
    tied = names[EMBEDDING] == names[HEAD]
    tables: dict[str, Table] = {}
    for role in roles:
        name = names[role]
        _check(checkpoint, name, asked[role], role, plain=tied or role == EMBEDDING)
        tables[name] = Table(bits[role], TIED if tied else role, asked[role])
    return tables


def tied_copies(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Stored name -> why it need not be written: the model ties it to another tensor, and it is equal to that. One that
    differs is written, since transformers loads it, whatever the configuration says."""
    return {
        name: "tied to the embedding"
        for name, source in architecture.tied.items()
        if checkpoint.tensors[name] == checkpoint.tensors[source]
        and torch.equal(checkpoint.read(name), checkpoint.read(source))
    }


def _check(checkpoint: Checkpoint, name: str, asked: str, role: str, *, plain: bool) -> None:
    """Raise SwquantError for a table that cannot be rounded. plain: whether loaders look into its weight alone."""
    if not name:
        raise SwquantError(f"{asked}: {checkpoint.name} stores no {role} as its model holds it; leave it out")
    model = empty_model(checkpoint)
    module = model.get_submodule(table_modules(model)[1]) if not plain else None
    if module is not None and type(module).forward is not nn.Linear.forward:
        raise SwquantError(
            f"{asked}: {name} is of a {type(module).__name__}, a layer with a forward of its own, which stock loaders cannot "
            "decode; leave it out"
        )
