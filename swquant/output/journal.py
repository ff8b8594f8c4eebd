"""A journal: lines of JSON that say what of a long piece of work is on the disk, to be taken up by another process.

    {"sha256": "…", "entry": {…}}      the first entry is the head: what the work is; then one entry for each step

A line's sha256 is over the one before and its own entry, so a line that is cut, damaged, moved or of another journal
ends what is believed: the intact lines from the first on, and nothing behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.json_file import parse_json

__all__ = ["Journal", "read_journal"]

Entry = Mapping[str, Any]


def _line(before: str, entry: Entry) -> tuple[str, bytes]:
    """The sha256 of an entry behind another one, and its line."""
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return digest, f'{{"sha256":"{digest}","entry":{text}}}\n'.encode()


def _read(path: Path) -> tuple[list[Entry], list[int], list[str]]:
    """The intact entries, and of each where its line ends and its sha256."""
    entries: list[Entry] = []
    ends: list[int] = []
    digests: list[str] = []
    position, before = 0, ""
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = parse_json(line)["entry"]
                before, whole = _line(before, entry)
            except (ValueError, TypeError, KeyError):
                break
            if whole != line:
                break
            position += len(line)
            entries.append(entry)
            ends.append(position)
            digests.append(before)
    return entries, ends, digests


def read_journal(path: Path) -> list[Entry]:
    """The intact entries of a journal, its head first; none where there is no journal that can be read."""
    try:
        return _read(path)[0]
    except OSError:
        return []


class Journal:
    """A journal that is written on. entries: what it holds already behind a head that is this one; none if the head is
    another, and then the journal begins anew. Raises OSError.
    """

    def __init__(self, path: Path, head: Entry) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            entries, self._ends, self._digests = _read(path)
            self.entries: Sequence[Entry] = entries[1:]
            if entries[:1] != [json.loads(json.dumps(head))]:
                self.entries, self._ends, self._digests = (), [], []
                self.append([head])
        except BaseException:
            self.close()
            raise

    def cut(self, count: int) -> None:
        """Believe only the first `count` entries behind the head."""
        self.entries = self.entries[:count]
        del self._ends[count + 1 :], self._digests[count + 1 :]

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries; they are on the disk when this returns. After an error or Ctrl-C it can be called again."""
        start, before = (self._ends[-1], self._digests[-1]) if self._ends else (0, "")
        ends, digests, text = [], [], b""
        for entry in entries:
            before, line = _line(before, entry)
            text += line
            ends.append(start + len(text))
            digests.append(before)
        os.ftruncate(self._file, start)
        done = 0
        while done < len(text):
            done += os.pwrite(self._file, text[done:], start + done)
        os.fsync(self._file)
        self._ends += ends
        self._digests += digests

    def forget(self) -> None:
        """Nobody is to take this up."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
