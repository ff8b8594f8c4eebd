"""How much memory there is: a container's limit counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import Cli
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.detect import pipeline
from swquant.models import memory


def group(folder: Path, limit: str, held: int = 700, files: int = 100) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{held}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 3\n")


@pytest.mark.parametrize(("limit", "left"), [("1000", 400), ("600", 0), ("100", 0)])
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int
) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    group(tmp_path, limit)
    assert memory.available_memory() == left


def test_without_one_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.available_memory() > 1_000_000
    group(tmp_path, "max")
    assert memory.available_memory() > 1_000_000
    (tmp_path / "memory.max").write_text("what?")
    assert memory.available_memory() > 1_000_000


GIB = 1 << 30


@pytest.mark.parametrize(("tokens", "writes"), [(0, True), (256, True), (256, False)])
def test_a_limit_decides_between_the_whole_model_and_its_files(
    planted_llama: Planted, tokens: int, writes: bool
) -> None:
    with open_checkpoint(planted_llama.folder) as checkpoint:
        tensors = checkpoint.tensors
        layer = sum(stored.nbytes for name, stored in tensors.items() if ".layers.0." in name)
        largest = layer if tokens else max(stored.nbytes for stored in tensors.values())
        text = tokens * 4 * (2 * 6 * 2 * 16 if writes else 4 * 64)  # keys and values of 6 layers, or hidden states
        least = GIB + 3 * largest + text
        whole = least + 2 * sum(stored.nbytes for stored in tensors.values())  # stored in float32, built in float32
        assert not memory.must_stay_on_disk(checkpoint, whole, tokens=tokens, writes=writes)
        assert memory.must_stay_on_disk(checkpoint, whole - 1, tokens=tokens, writes=writes)
        assert memory.must_stay_on_disk(checkpoint, least, tokens=tokens, writes=writes)
        with pytest.raises(swquant.SwquantError, match=r"needs 1\.1 GB, --memory is 1\.1 GB"):
            memory.must_stay_on_disk(checkpoint, least - 1, tokens=tokens, writes=writes)


def test_what_cannot_stay_on_disk_needs_the_whole_model(
    planted_llama: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(planted_llama.folder) as checkpoint:
        monkeypatch.setattr(type(checkpoint), "can_stay_on_disk", property(lambda self: False))
        assert not memory.must_stay_on_disk(checkpoint, 2 * GIB)
        with pytest.raises(swquant.SwquantError, match="safetensors would take"):
            memory.must_stay_on_disk(checkpoint, GIB + 10**6)


def test_the_limit_is_kept_by_the_commands(
    planted_llama: Planted, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["detect"], ["compress", "--preset", "best", "--dry-run"]):
        ran = cli(words[0], str(planted_llama.folder), *words[1:], "--memory", "900MB")
        assert ran.code == 1
        assert "needs 1.1 GB, --memory is 900.0 MB" in " ".join(ran.err.split())
    streamed: list[str] = []
    offloaded = pipeline.offloaded_model
    monkeypatch.setattr(pipeline, "offloaded_model", lambda *given: streamed.append("") or offloaded(*given))
    whole = swquant.detect(planted_llama.folder, PROMPT, memory="2GB")
    assert not streamed
    part = swquant.detect(planted_llama.folder, PROMPT, memory=GIB + 10**6)
    assert streamed
    assert part.detection.super_weights == whole.detection.super_weights
