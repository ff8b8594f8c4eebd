"""The journal: what is intact is believed, from the first line on, and nothing behind a line that is not."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from swquant.output.journal import Journal, read_journal

HEAD = {"what": "this", "numbers": [1, 2.5, None, "ä"]}


def written(path: Path, count: int) -> list[int]:
    """A journal of so many steps; where each of its lines ends."""
    ends = []
    with closing(Journal(path, HEAD)) as journal:
        ends.append(path.stat().st_size)
        for index in range(count):
            journal.append([{"step": index}])
            ends.append(path.stat().st_size)
    return ends


def test_it_is_written_on_by_another_process(tmp_path: Path) -> None:
    written(tmp_path / "journal", 3)
    with closing(Journal(tmp_path / "journal", HEAD)) as journal:
        assert journal.entries == [{"step": index} for index in range(3)]
        journal.append([{"step": 3}, {"step": 4}])
    assert read_journal(tmp_path / "journal") == [HEAD, *({"step": index} for index in range(5))]


def test_cut_anywhere_it_holds_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = written(path, 4)
    text = path.read_bytes()
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        assert len(read_journal(path)) == sum(end <= length for end in ends)


def test_a_damaged_byte_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = written(path, 4)
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 4]) + text[place + 1 :])
        assert len(read_journal(path)) == sum(end <= place for end in ends)


def test_a_line_of_another_journal_ends_it(tmp_path: Path) -> None:
    written(tmp_path / "journal", 4)
    with closing(Journal(tmp_path / "other", {"what": "that"})) as other:
        other.append([{"step": 0}])
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    lines[1] = (tmp_path / "other").read_bytes().splitlines(keepends=True)[1]
    (tmp_path / "journal").write_bytes(b"".join(lines))
    assert read_journal(tmp_path / "journal") == [HEAD]


def test_another_head_begins_it_anew(tmp_path: Path) -> None:
    written(tmp_path / "journal", 4)
    with closing(Journal(tmp_path / "journal", {"what": "that"})) as journal:
        assert list(journal.entries) == []
    assert read_journal(tmp_path / "journal") == [{"what": "that"}]


def test_after_a_cut_the_rest_is_gone_with_the_next_entry(tmp_path: Path) -> None:
    written(tmp_path / "journal", 4)
    with closing(Journal(tmp_path / "journal", HEAD)) as journal:
        journal.cut(2)
        journal.append([{"step": "new"}])
    assert read_journal(tmp_path / "journal") == [HEAD, {"step": 0}, {"step": 1}, {"step": "new"}]


def test_an_interrupted_append_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def half(file: int, text: bytes, place: int) -> int:
        pwrite(file, text[:10], place)
        raise KeyboardInterrupt

    with closing(Journal(tmp_path / "journal", HEAD)) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half)
            with pytest.raises(KeyboardInterrupt):
                journal.append([{"step": 0}])
        journal.append([{"step": 0}])
    assert read_journal(tmp_path / "journal") == [HEAD, {"step": 0}]


@pytest.mark.parametrize("text", [b"", b"\xff\n", b"[" * 100_000, b"null\n", b'{"entry": 1}\n', b"NaN\n" * 5])
def test_what_is_no_journal_holds_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "journal").write_bytes(text)
    assert read_journal(tmp_path / "journal") == []
    assert read_journal(tmp_path / "none") == []
