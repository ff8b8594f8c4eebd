"""The reports in a real browser: no error in the console, every figure visible, phone and desktop, light and dark.

Chromium runs without a window and prints the page after a small script has measured it. The page stands in a frame,
because a window of Chromium is never narrower than 500 pixels, and a phone is.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.study_world import OPTIONS, PROMPT, make_world

import swquant
from swquant.compress.report import REPORT

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
PHONE, DESKTOP = 390, 1280
MEASURE = """<script>
addEventListener('load', () => {
  const box = (element) => { const {left, right, width, height} = element.getBoundingClientRect(); return {left, right, width, height} }
  const svgs = [...document.querySelectorAll('svg.chart')]
  const text = (svg) => Math.min(...[...svg.querySelectorAll('text')].map((item) => item.getBoundingClientRect().height))
  parent.postMessage(JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    figures: svgs.map((svg) => ({...box(svg), text: text(svg), fill: getComputedStyle(svg.querySelector('text')).fill})),
    tables: [...document.querySelectorAll('.scroll')].map(box),
  }), '*')
})
</script></head>"""
FRAME = """<!doctype html><body style="margin:0"><iframe src="{name}" style="border:0;width:{width}px;height:900px"></iframe>
<script>addEventListener('message', (event) => {{ document.body.dataset.measured = event.data }})</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium is installed; on Debian `apt-get install chromium` brings one")
    return path


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of a model with a super weight, of one without, and of a compressed checkpoint."""
    folder = tmp_path_factory.mktemp("reports")
    planted, control = make_world(folder / "planted", planted=True), make_world(folder / "control", planted=False)
    for world in (planted, control):
        swquant.study(world.folder, world.text.read_text(), world.folder.parent / "study", quick=True, **OPTIONS)
    small = swquant.compress(planted.folder, folder / "small", prompt=PROMPT).path
    return {
        "planted": folder / "planted/study/report.html", "control": folder / "control/study/report.html",
        "checkpoint": small / REPORT,
    }  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the browser measured, and what it wrote to the console."""

    measured: dict[str, Any]
    console: list[str]


def see(browser: str, report: Path, width: int, dark: bool, folder: Path) -> Seen:
    page = report.read_text(encoding="utf-8")
    assert "</head>" in page
    (folder / "page.html").write_text(page.replace("</head>", MEASURE, 1), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(name="page.html", width=width), encoding="utf-8")
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [
        browser, *FLAGS, theme, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},1000",
        "--virtual-time-budget=10000", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'data-measured="([^"]*)"', ran.stdout)
    assert found, ran.stdout[-500:] + ran.stderr[-500:]
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console)


def brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["planted", "control", "checkpoint"])
def test_every_figure_is_seen(
    browser: str, reports: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    seen = see(browser, reports[name], width, dark, tmp_path)
    assert seen.console == []
    measured = seen.measured
    assert measured["width"] == width
    assert measured["scroll"] <= width, "the page is wider than the screen"
    figures = measured["figures"]
    assert len(figures) == {"planted": 11, "control": 6, "checkpoint": 3}[name]
    for figure in figures:
        assert figure["left"] >= 0
        assert figure["right"] <= width
        assert figure["width"] >= min(300, 0.75 * width)
        assert figure["height"] >= 150
        assert figure["text"] >= 8, "text too small to read"
        # Text takes its colour from the page, so it is dark on light and light on dark.
        assert abs(brightness(figure["fill"]) - brightness(measured["background"])) > 0.6
    for table in measured["tables"]:
        assert table["right"] <= width
    assert brightness(measured["background"]) < 0.2 if dark else brightness(measured["background"]) > 0.9
    beside = any(a["left"] != b["left"] for a in figures for b in figures)
    assert beside == (width == DESKTOP)


def test_the_browser_would_tell_of_an_error(browser: str, reports: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    page = reports["checkpoint"].read_text(encoding="utf-8")
    broken.write_text(page.replace("</body>", "<script>nothing.here()</script></body>"), encoding="utf-8")
    assert any("nothing is not defined" in line for line in see(browser, broken, DESKTOP, False, tmp_path).console)
