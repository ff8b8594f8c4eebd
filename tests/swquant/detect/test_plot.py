"""The plot: what it marks, where its labels are, and what is drawn at all."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from exporters.errors import SwquantError
from swquant.detect.plot import check_plot_file, plot_detection

LAYERS = 30


def weight(layer: int, role: str, row: int, col: int) -> dict[str, Any]:
    return {"layer": layer, "role": role, "row": row, "col": col}


def record(super_weights: list, cancellers: list) -> dict[str, Any]:
    layers = [{"layer": i, "input": 1.0 + i, "output": 10.0 + i} for i in range(LAYERS)]
    for item in (*super_weights, *cancellers):
        layers[item["layer"]] |= {"input": 3000.0, "output": 24000.0 - 200 * item["layer"]}
    return {"layers": layers, "super_weights": super_weights, "cancellers": cancellers}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, kept open."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    return drawn


SMOLLM2 = record(
    [weight(11, "creator", 507, 1229), weight(11, "companion", 507, 1487)],
    [weight(28, "canceller", 507, 678), weight(29, "canceller", 507, 1165), weight(29, "canceller", 507, 999)],
)


def test_it_shows_every_layer_and_marks_what_was_found(figures: list[Figure], tmp_path: Path) -> None:
    plot_detection(SMOLLM2, tmp_path / "figure.png", title="SmolLM2")
    (figure,) = figures
    assert figure.get_suptitle() == "SmolLM2: 2 super weights"
    for panel, key in zip(figure.axes, ("input", "output"), strict=True):
        assert panel.get_yscale() == "log"
        curve, *marks = panel.lines
        assert list(curve.get_xdata()) == list(range(LAYERS))
        assert list(curve.get_ydata()) == [item[key] for item in SMOLLM2["layers"]]
        assert [(mark.get_marker(), int(mark.get_xdata()[0])) for mark in marks] == [("*", 11), ("X", 28), ("X", 29)]
        labels = [text.get_text() for text in panel.texts]
        assert labels[0] == "layer 11\ncreator [507, 1229]\ncompanion [507, 1487]"
        assert labels[2] == "layer 29\ncanceller [507, 1165]\ncanceller [507, 999]"


@pytest.mark.parametrize("layers", [(11, 28, 29), (0, 1, 2, 3), (26, 27, 28, 29)], ids=str)
def test_no_label_covers_another(figures: list[Figure], tmp_path: Path, layers: tuple[int, ...]) -> None:
    found = record([weight(layer, "creator", 507, 1000 + layer) for layer in layers], [])
    plot_detection(found, tmp_path / "figure.png", title="model")
    figures[0].draw_without_rendering()  # saving used another resolution
    for panel in figures[0].axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == len(layers)
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_model_without_super_weights_has_a_plot_too(figures: list[Figure], tmp_path: Path) -> None:
    plot_detection(record([], []), tmp_path / "figure.svg", title="plain")
    assert figures[0].get_suptitle() == "plain: no super weights"
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_the_file_is_checked_first(tmp_path: Path) -> None:
    check_plot_file(tmp_path / "figure.PDF")
    with pytest.raises(SwquantError, match=r"a plot is \.png, \.svg or \.pdf"):
        check_plot_file(tmp_path / "figure.jpeg")
    with pytest.raises(SwquantError, match="does not exist; create it first"):
        check_plot_file(tmp_path / "no" / "figure.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SwquantError, match=r"folder\.png: cannot be written"):
        plot_detection(SMOLLM2, tmp_path / "folder.png", title="model")
