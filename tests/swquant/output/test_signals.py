"""Signals: a run that is ended leaves nothing, and what is being put in order is put in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import PROJECT
from support.written import finish, names

from swquant.interrupts import sigterm_interrupts, uninterrupted

CHILD = """
import os, signal, sys, time
from pathlib import Path
from swquant.output.destination import unfinished
try:
    with unfinished(Path(sys.argv[1])) as folder:
        (folder / "half").write_text("half")
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))
    print("finished", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def child(out: Path, seconds: float, *, ignore: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignore else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = child(tmp_path / "out", 60)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert names(tmp_path) == set()


def test_who_is_told_to_ignore_a_closed_terminal_ignores_it(tmp_path: Path) -> None:
    process = child(tmp_path / "out", 1, ignore=True)  # as nohup does
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "finished\n"


def test_a_killed_run_leaves_what_the_next_one_removes(tmp_path: Path) -> None:
    process = child(tmp_path / "out", 60)
    process.kill()
    process.communicate()
    assert len(names(tmp_path)) == 1
    finish(tmp_path / "other", "new")
    assert names(tmp_path) == {"other"}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_what_is_being_put_in_order_is_put_in_order(number: signal.Signals) -> None:
    done: list[str] = []

    def put_in_order() -> None:
        with sigterm_interrupts(), uninterrupted():
            signal.raise_signal(number)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        put_in_order()
    assert done
