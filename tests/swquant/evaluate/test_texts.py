"""Texts as editors save them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import Cli
from support.tiny_models import Planted, sample_text

TEXT = sample_text(60)


def measured(cli: Cli, model: Path, path: Path) -> dict[str, float]:
    ran = cli("eval", model, "--text", path, "--json")
    assert ran.code == 0, ran.err
    return dict(json.loads(ran.out))


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace(" ", "\r\n").encode()],
    ids=["a byte order mark", "lines of Windows"],
)
def test_what_windows_editors_add_is_no_text(cli: Cli, bf16_llama: Planted, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plain.txt").write_text(TEXT)
    (tmp_path / "windows.txt").write_bytes(content)
    expected = measured(cli, bf16_llama.folder, tmp_path / "plain.txt")
    assert measured(cli, bf16_llama.folder, tmp_path / "windows.txt") == expected


def test_utf_16_is_one_message(cli: Cli, bf16_llama: Planted, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-16")
    ran = cli("eval", bf16_llama.folder, "--text", tmp_path / "t.txt")
    assert ran.code == 1
    assert "not UTF-8 text; give a plain text file" in ran.err
