"""What a method of the quality benchmark is: from a model's linear weights to the weights that its storage stands for.

    Cell       bits and block that rows of one table have in common
    Original   the model that is rounded, its linear weights, and the text that calibrated methods may read
    Importance what a tool weighs its errors with, where it takes such a thing: nothing, the inputs on swquant's one
               prompt, or the inputs on the calibration text
    Outcome    float weights [out, in] under the original's names, and every byte that stores them
    Method     one row: a tool, one way to call it, and the cells that it has something to say in

Stored bytes are counted as a file would hold them: codes at their packed size, scales, zero points, second-level
scales, outliers with their coordinates, padding. Scales that a tool computes in float32 are rounded to the 16 bits
that its file formats store, before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.pipeline import find_super_weights
from swquant.evaluate.pipeline import make_windows
from swquant.models.architecture import describe
from swquant.models.loading import build_model

__all__ = [
    "CELLS",
    "PLAIN",
    "PROMPT",
    "TEXT",
    "Cell",
    "Importance",
    "Method",
    "Original",
    "Outcome",
    "Rounded",
    "each_weight",
    "group_of",
    "missing",
    "versions",
]


@dataclass(frozen=True)
class Cell:
    """block: in swquant's own words, `64` or `channel` (one scale per row)."""

    bits: int
    block: str

    def __str__(self) -> str:
        return f"{self.bits}-{self.block}"

    @property
    def title(self) -> str:
        return f"{self.bits} bits, {'one scale per row' if self.block == 'channel' else f'block {self.block}'}"


CELLS = tuple(Cell(bits, block) for bits in (4, 3) for block in ("64", "128", "channel"))


def group_of(cell: Cell, inputs: int) -> int:
    """The cell's block where it divides the inputs, else half of it, and so on: as swquant does it."""
    group = inputs if cell.block == "channel" else int(cell.block)
    while inputs % group:
        group //= 2
    return group


@dataclass(frozen=True)
class Rounded:
    """One tensor: what its stored form decodes to [out, in], and how many bytes that form takes."""

    weight: Tensor
    nbytes: float


@dataclass(frozen=True)
class Outcome:
    """All linear weights, rounded. notes: what the name of the method does not say."""

    state: dict[str, Tensor]
    nbytes: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Original:
    """folder: the model off its grid, float32. calibration: text; windows, window: how much of it is read."""

    folder: Path
    checkpoint: Checkpoint
    calibration: str
    windows: int = 16
    window: int = 256

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear weights of the decoder layers; everything else stays as it is."""
        return tuple(describe(self.checkpoint).weights)

    @cached_property
    def weights(self) -> int:
        return sum(self.checkpoint.tensors[name].numel for name in self.linears)

    @cached_property
    def calibration_ids(self) -> list[Tensor]:
        """int64 [window] each, a BOS token in front where the model's tokenizer puts one."""
        cut = make_windows(self.checkpoint, self.calibration, self.window, self.windows)
        start = torch.tensor([] if cut.bos is None else [cut.bos], dtype=torch.int64)
        return [torch.cat([start, ids]) for ids in cut.ids]

    @cached_property
    def energies(self) -> dict[str, Tensor]:
        """Name -> energy [in] of every input channel on swquant's one prompt, as far as the prompt reaches."""
        found = find_super_weights(self.checkpoint)
        seen = {name: found.energy(name) for name in self.linears}
        return {name: energy for name, energy in seen.items() if energy is not None}

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Name -> mean square [in] of every input channel over the calibration text: an importance matrix."""
        model = build_model(self.checkpoint, torch.float32)
        sums: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
                total = inputs[0].detach().flatten(0, -2).square().sum(dim=0)
                sums[name] = sums[name] + total if name in sums else total

            return hook

        for name in self.linears:
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
        with torch.no_grad():
            for ids in self.calibration_ids:
                model.model(input_ids=ids.unsqueeze(0), use_cache=False)
        tokens = sum(len(ids) for ids in self.calibration_ids)
        return {name: total / tokens for name, total in sums.items()}


@dataclass(frozen=True)
class Importance:
    """name: as rows end that have it. of: from an original to a float32 [in] per linear weight."""

    name: str
    of: Callable[[Original], Mapping[str, Tensor]]
    calibrated: bool = False


PLAIN = Importance("", lambda original: {})
PROMPT = Importance(", one prompt", lambda original: original.energies)
TEXT = Importance(", importance matrix", lambda original: original.moments, calibrated=True)


@dataclass(frozen=True)
class Method:
    """name: of the row. packages: distributions whose versions identify the result. call: what is called, for readers.

    run raises ImportError where a package is missing. calibrated: it reads the calibration text.
    """

    name: str
    packages: tuple[str, ...]
    call: str
    run: Callable[[Original, Cell], Outcome]
    cells: Sequence[Cell] = CELLS
    calibrated: bool = False


def each_weight(round_one: Callable[[Tensor, Cell], Rounded]) -> Callable[[Original, Cell], Outcome]:
    """A method that looks at one tensor at a time."""

    def run(original: Original, cell: Cell) -> Outcome:
        return gather((name, round_one(original.checkpoint.read(name), cell)) for name in original.linears)

    return run


def gather(rounded: Iterator[tuple[str, Rounded]]) -> Outcome:
    state: dict[str, Tensor] = {}
    nbytes = 0.0
    for name, result in rounded:
        state[name] = result.weight
        nbytes += result.nbytes
    return Outcome(state, nbytes)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> installed version. Raises PackageNotFoundError."""
    return {name: metadata.version(name) for name in packages}


def missing(error: Exception) -> str:
    """One line for a row that could not be measured."""
    if isinstance(error, metadata.PackageNotFoundError):
        return f"not installed: {error.name}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def open_original(folder: Path, calibration: str) -> Original:
    return Original(folder, open_checkpoint(folder), calibration)
