"""The folder of a study: the page, its figures and tables, and the record."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from support.study_world import rows

from swquant.drawing.section import Interval, Table
from swquant.study.pipeline import Study, _csv, _plain


def test_the_folder_holds_report_figures_and_tables(study: Study) -> None:
    names = {path.relative_to(study.path).as_posix() for path in study.path.rglob("*") if path.is_file()}
    charts = [chart.name for item in study.sections for chart in item.charts]
    tables = [table.name for item in study.sections for table in item.tables]
    assert len(charts) == len(set(charts)) == 11
    assert {name for name in names if not name.startswith("cache/")} == {
        "report.html", "study.json", *(f"figures/{name}.svg" for name in charts), *(f"tables/{name}.csv" for name in tables),
    }  # fmt: skip
    record = json.loads((study.path / "study.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert record == study.record
    with (study.path / "tables/importance.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    values = rows(study, "importance", "importance")
    assert [float(line["perplexity"]) for line in lines] == [row["perplexity"]["value"] for row in values]
    assert float(lines[1]["perplexity low"]) == values[1]["perplexity"]["low"]


def test_the_page_is_whole_and_asks_for_nothing(study: Study) -> None:
    page = (study.path / "report.html").read_text()
    assert page.count("<svg") == 11
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"|url\((?!#)|@import|<script', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    for item in study.sections:
        assert item.title in page
    assert "INT8" in page


def test_a_loss_that_is_no_number_is_said_to_be_none() -> None:
    assert str(Interval(math.nan)) == "not finite"
    assert _plain(Interval(math.inf, 1.0, math.nan)) == {"value": None, "low": 1.0, "high": None}
    table = Table("t", "", ("a", "b"), (("x", Interval(math.nan)), ("y", 2.0)))
    assert _csv(table).splitlines() == ["a,b,b low,b high", "x,nan,,", "y,2.0,,"]
