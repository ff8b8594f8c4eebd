"""What every test may ask for: models that are made once per session, and the command line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that share the cores take a thread each, and so does what they start: threads that wait for a core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import torch
from support.command_line import Cli, Ran
from support.pretended import pretended_gpu  # before the first backward, which counts devices once
from support.tiny_models import Planted, planted_model, save_model, tiny_model

# What a shell starts in the background ignores the first, what nohup starts the second.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples every time, however slow the machine; a test that wants more or fewer of them says so.
settings.register_profile("swquant", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("swquant")


@pytest.fixture(scope="session")
def planted_llama(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A llama with a super weight, in float32."""
    return planted_model("llama", tmp_path_factory.mktemp("planted") / "tiny-llama")


@pytest.fixture(scope="session")
def control_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same llama without it."""
    return save_model(tiny_model("llama"), tmp_path_factory.mktemp("control") / "control-llama")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _stock_transformers() -> Iterator[None]:
    """What `import swquant.hf` tells transformers is taken back: the next test may ask what stock loaders do."""
    yield
    if (hf := sys.modules.pop("swquant.hf", None)) is not None:
        hf.unregister()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("detect", folder, "--json")`: the real command line, in this process (a new one waits for torch)."""
    from swquant.cli import main

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["swquant", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """One that is none (`support.pretended`), with all the memory that is asked for."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pretended_gpu() as device:
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
