"""The report in a checkpoint: what it says, and that it belongs to the checkpoint like every other file."""

from __future__ import annotations

import html
import re
from pathlib import Path

import swquant
from swquant.compress.report import REPORT


def text_of(folder: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", (folder / REPORT).read_text(encoding="utf-8")))


def test_it_says_what_was_found_and_what_rounding_changed(compressed: Path) -> None:
    text, manifest = text_of(compressed), swquant.inspect(compressed)
    (found,) = manifest["detection"]["super_weights"]
    assert f"[{found['row']}, {found['col']}]" in text
    rounded = {name: record for name, record in manifest["tensors"].items() if "relative_error" in record}
    assert f"{len(rounded)} tensors were rounded" in text
    worst = max(rounded, key=lambda name: rounded[name]["relative_error"])
    assert f"{worst}  {rounded[worst]['stored_as']}" in re.sub(r"\s\s+", "  ", text)
    for loader, verdict in manifest["loaders"].items():
        assert f"loads in {loader}" in text
        assert verdict in text
    assert manifest["source"]["name"] in text


def test_it_asks_for_nothing_from_elsewhere(compressed: Path) -> None:
    page = (compressed / REPORT).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"|url\((?!#)|@import|<script', page)


def test_verify_covers_it(damaged: Path) -> None:
    assert REPORT in swquant.inspect(damaged)["files"]
    with (damaged / REPORT).open("a", encoding="utf-8") as file:
        file.write(" ")
    (problem,) = swquant.verify(damaged)
    assert problem.startswith(f"{REPORT}: ")
