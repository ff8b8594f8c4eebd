"""JSON files that are none: one message, which names the file, and nothing that waits or grows without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporters.errors import CheckpointError
from exporters.json_file import read_json, read_json_value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON .*BOM"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON .nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_what_is_no_object_is_one_message(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"x\.json: {message}.*fetch or save it again") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_any_value_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('["ü", null]', encoding="utf-8")
    assert read_json_value(tmp_path / "x.json") == ["ü", None]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="not a file; put the file itself there"):
        read_json(tmp_path / "x.json")


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a file"):
        read_json(tmp_path / "x.json")


def test_a_hole_of_32_gibibytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{}")
    os.truncate(tmp_path / "x.json", 1 << 35)
    with pytest.raises(CheckpointError, match="34,359,738,368 bytes are more than 268,435,456"):
        read_json(tmp_path / "x.json")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="x.json: cannot be read .No such file or directory.; "):
        read_json(tmp_path / "x.json")
