"""The section of a training run."""

from typing import Any

from swquant.drawing.page import appended, page
from swquant.drawing.section import Bars, Chart
from swquant.tune.report import tuning_page, tuning_section

RECORD: Any = {
    "blocks": 10,
    "losses": [3.0, 2.0, 1.0],
    "held_out_before": 3.5,
    "held_out_after": 1.25,
    "data": "own text",
}


def test_blocks_are_counted_by_layer_and_by_kind() -> None:
    blocks = {
        "model.layers.0.self_attn.v_proj.weight": 6,
        "model.layers.2.mlp.down_proj.weight": 3,
        "model.layers.2.self_attn.v_proj.weight": 1,
    }
    section = tuning_section("tuned", RECORD, blocks)
    losses, layers, kinds = section.charts
    assert isinstance(losses, Chart)
    assert isinstance(layers, Chart)
    assert isinstance(kinds, Bars)
    assert losses.series[0].y == (3.0, 2.0, 1.0)
    assert losses.series[1].y == (3.5, 1.25)
    assert [(series.label, series.y) for series in layers.series] == [
        ("attention", (6.0, 0.0, 1.0)),
        ("MLP", (0.0, 0.0, 3.0)),
    ]
    assert kinds.categories == ("v_proj", "down_proj")
    assert [share.value for share in kinds.values[0]] == [0.7, 0.3]
    assert section.agrees is True
    assert "70% of the blocks lie in attention; the kind with most is v_proj (70%)" in section.finding
    assert tuning_section("tuned", RECORD, {"h.0.mlp.c_fc.weight": 3}).agrees is False
    assert tuning_section("tuned", RECORD, {"gpt.h.0.attn.c_proj.weight": 3}).agrees is False


def test_scales_alone_have_losses_and_no_places() -> None:
    section = tuning_section("tuned", {**RECORD, "blocks": 0, "scales": 99}, {})
    assert [chart.name for chart in section.charts] == ["tuned-losses"]
    assert section.agrees is None
    assert "99 scales and offsets were trained in 3 steps" in section.finding


def test_it_is_added_to_the_page_that_is_there() -> None:
    old = page("out, compressed", (), ["<p>rounding</p>"])
    new = tuning_page(old, "out", "tuned", RECORD, {"a.0.v_proj.weight": 1})
    assert new.count("<html") == new.count("</html>") == 1
    assert new.index("rounding") < new.index('id="tuned-tuned"') < new.index("</main>")
    assert tuning_page(new, "out", "tuned-2", RECORD, {}).count("<section") == 2
    assert "<title>out, tuned</title>" in tuning_page(None, "out", "tuned", RECORD, {})
    assert appended("<html>another</html>", "x") is None
    assert "<title>out, tuned</title>" in tuning_page("<html>another</html>", "out", "tuned", RECORD, {})
