"""The cells of a table that several processes fill, each into a JSON file of its own, and that one reads together.

A cell that was computed is written at once, whole or not at all; one that fails is printed and left out, and another
run tries it again. Settings stand in every file, and files of other settings are refused: what is read together belongs
together.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe as machine

from swquant.models.devices import named
from swquant.output.destination import write_whole

__all__ = ["Cells", "card", "clock"]


class Cells:
    """all: the cells of some files; own: those of the first, into which new ones go. settings: that all of them have,
    None for those that they have, whatever these are. device: what this process computes on."""

    def __init__(self, paths: Sequence[Path], settings: dict[str, Any] | None, device: str = "cpu") -> None:
        self.path, self.device = paths[0], device
        self.own: dict[str, Any] = {}
        self.all: dict[str, Any] = {}
        for path in (*paths[1:], self.path):
            if not path.exists():
                continue
            held = json.loads(path.read_text())
            settings = held["settings"] if settings is None else settings
            if held["settings"] != settings:
                raise SystemExit(f"{path} holds results of other settings: {held['settings']}")
            self.all |= held["cells"]
            if path == self.path:
                self.own = held["cells"]
        self.settings = settings

    def fill(self, key: str, compute: Callable[[], Any], said: Callable[[Any], str]) -> None:
        """Compute a cell unless it is there, write it, and say in a line what it is."""
        if key in self.all:
            return
        try:
            cell = compute()
        except Exception as error:
            traceback.print_exc()
            print(f"{key} is left out: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            return
        self.own[key] = self.all[key] = cell
        content = {"machine": {**machine(), "device": self.device}, "settings": self.settings, "cells": self.own}
        write_whole(self.path, json.dumps(content, indent=1).encode())
        print(f"{key}: {said(cell)}", flush=True)


def card(device: torch.device) -> str:
    """A device with the name of its GPU; cpu."""
    return named(device).removeprefix(" on ") or "cpu"


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, which may have other work; on a GPU the clock's, when all work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
