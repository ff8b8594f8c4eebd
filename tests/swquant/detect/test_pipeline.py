"""Planted super weights are found, exactly those, in every architecture; models without one give an empty list."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import ARCHITECTURES, PROMPT, planted_model, save_model, tiny_model

import swquant


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_super_weight_is_found_and_nothing_else(architecture: str, tmp_path: Path) -> None:
    planted = planted_model(architecture, tmp_path / architecture)
    found = swquant.detect(planted.folder, PROMPT).detection
    assert [(w.name, w.row, w.col, w.role) for w in found.super_weights] == [
        (planted.name, planted.row, planted.col, "creator")
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_without_a_super_weight_gives_an_empty_list(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tiny_model(architecture), tmp_path / architecture)
    found = swquant.detect(folder, PROMPT).detection
    assert found.super_weights == ()
    assert found.super_activations == ()
