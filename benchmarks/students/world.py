"""What the parts share: settings, the teacher and its texts, and the JSON file that remembers what is done.

Of every text the first three quarters are trained on, an eighth is looked at by `auto` to find its stage, and the last
eighth is measured on: neither training nor a decision has seen it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import describe as machine
from torch import nn
from transformers import PreTrainedModel

from swquant.checkpoints.base import Checkpoint
from swquant.distill.options import DistillOptions
from swquant.distill.student import StudentCheckpoint
from swquant.distill.teaching import held_out
from swquant.models.architecture import describe
from swquant.models.loading import build_model
from swquant.output.destination import write_whole
from swquant.training.data import Corpus, text_windows

__all__ = ["Cell", "Results", "Settings", "Text", "World"]

Cell = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """layers: those that students keep, as `--layers auto` found them in SmolLM2. scratch: tokens of `table2`'s models,
    in steps; experts: of its standard mixture's layers. first: seed, where several processes share the seeds out, each
    with a JSON file of its own. Of the other fields the command line tells."""

    folder: Path
    layers: str = "0-12,15,18-29"
    steps: int = 16
    batch: int = 2
    window: int = 128
    rate: float = 1e-4
    first: int = 0
    seeds: int = 3
    held: int = 6
    bits: tuple[int, ...] = (4,)
    preset: str = "best"
    texts: int = 16
    device: str = "cpu"
    scratch: int = 400
    experts: int = 16


class Results:
    """The JSON file: part -> its settings and cells. It is written whenever a cell is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, part: str, settings: dict[str, Any]) -> Callable[[str, Callable[[], Cell]], Cell]:
        """(key, make) -> the cell, made unless it is there. Stops where the file holds the part of other settings."""
        known = self.parts.setdefault(part, {"machine": machine(), "settings": settings, "cells": {}})
        if known["settings"] != settings:
            raise SystemExit(f"{self.path}: its {part} has other settings; take another file\n{known['settings']}")
        cells: dict[str, Cell] = known["cells"]

        def cell(key: str, make: Callable[[], Cell]) -> Cell:
            if key not in cells:
                cells[key] = make()
                write_whole(self.path, json.dumps(self.parts, indent=1).encode())
                print(f"{part}: {key}: {cells[key]}", flush=True)
            return cells[key]

        return cell


@dataclass(frozen=True)
class Text:
    name: str
    train: Corpus
    looks: Corpus
    held: Corpus


class World:
    """The teacher, what is cut from it, and the texts. files: name -> file."""

    def __init__(self, teacher: Checkpoint, files: dict[str, Path], settings: Settings) -> None:
        self.teacher, self.settings, self.files = teacher, settings, files
        self.layers = describe(teacher).layers
        keep = DistillOptions(layers=settings.layers).listed(len(self.layers))
        if keep is None:
            raise SystemExit("--layers auto searches; name the layers that stay")
        self.keep = keep

    def said(self, *names: str) -> dict[str, Any]:
        """What a part depends on: the teacher, the texts and some of the settings."""
        texts = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in self.files.items()}
        of_settings = {name: getattr(self.settings, name) for name in ("window", *names)}
        said = {"teacher": self.teacher.fingerprint, "texts": texts, **of_settings}
        content: dict[str, Any] = json.loads(json.dumps(said))  # as it will be read again
        return content

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """Cut and split."""
        return tuple(self._text(name, file.read_text()) for name, file in self.files.items())

    def _text(self, name: str, content: str) -> Text:
        train, rest = text_windows(self.teacher, content, self.settings.window, name).split(0.25)
        looks, held = rest.split(0.5)
        few = [Corpus(name, part.sequences[: self.settings.held], part.pad) for part in (looks, held)]
        return Text(name, train, *few)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The teacher in float32."""
        return build_model(self.teacher, torch.float32, self.settings.device).requires_grad_(False)

    def student(self) -> StudentCheckpoint:
        """As it is cut."""
        return StudentCheckpoint(self.teacher, self.keep, self.layers)

    @property
    def source(self) -> Path:
        """The teacher as it was given."""
        (file, *_) = self.teacher.files
        return file if file.suffix == ".gguf" else self.teacher.folder

    def scores(self, model: nn.Module, texts: Sequence[Text] = ()) -> dict[str, list[float]]:
        """Text -> [cross entropy, KL from the teacher], nats per token of what is measured on."""
        size = self.settings.batch
        return {text.name: list(held_out(model, self.model, text.held, size)) for text in texts or self.texts}
