"""Every verb that has `--device`, on a real GPU: what comes out is what comes out of the CPU, as far as sums in another
order allow. `make test-gpu` runs them; pretended devices (support/pretended.py) stand in for it everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.gguf_models import PROMPT as WORDS
from support.gguf_models import save_byte_level
from support.tiny_models import PROMPT, TOKENS, plant, planted_model, sample_text, tiny_model

import swquant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICES = ("cpu", "cuda")
TEXT = sample_text(1200)
TRAINED: dict[str, Any] = {"steps": 4, "batch": 2, "window": 32, "lr": "1e-3"}


@pytest.fixture(scope="module", params=["llama", "gemma3", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model."""
    return planted_model(request.param, tmp_path_factory.mktemp(request.param) / "model").folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, compressed on the CPU."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    return swquant.compress(folder, out, prompt=PROMPT, block="32", device="cpu").path


def logits(model: Path, device: str = "cpu") -> torch.Tensor:
    """[tokens, vocabulary] float32."""
    loaded = swquant.load(model, dtype=torch.float32, device=device)
    with torch.no_grad():
        return loaded(input_ids=TOKENS.to(device), use_cache=False).logits[0].cpu()


def on_both(make: Callable[[str, Path], object], folder: Path) -> tuple[Path, Path]:
    """What is made on the CPU and on the GPU."""
    for device in DEVICES:
        make(device, folder / device)
    return folder / "cpu", folder / "cuda"


def test_the_same_super_weights(folder: Path) -> None:
    found = [swquant.detect(folder, PROMPT, device=device) for device in DEVICES]
    here, there = ([(item.name, item.row, item.col) for item in each.detection.super_weights] for each in found)
    assert here
    assert there == here


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "fast"},
        {"preset": "balanced"},
        {"preset": "balanced", "offsets": "float"},
        {"preset": "best", "texts": 4},
        {"bits_budget": 4.6},
    ],
    ids=str,
)
def test_a_checkpoint_is_as_good(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    def make(device: str, out: Path) -> None:
        swquant.compress(folder, out, prompt=PROMPT, block="32", device=device, **options)

    here, there = on_both(make, tmp_path)
    original = logits(folder)
    lost_here, lost_there = (float((logits(path) - original).norm()) for path in (here, there))
    assert lost_there < 1.15 * lost_here
    assert swquant.verify(there, loads=True) == []


def test_loaded_there_it_predicts_the_same(checkpoint: Path) -> None:
    torch.testing.assert_close(logits(checkpoint, "cuda"), logits(checkpoint), atol=2e-3, rtol=2e-3)


def test_measured_there_it_is_as_good(folder: Path, checkpoint: Path) -> None:
    found = [
        swquant.evaluate(checkpoint, TEXT, against=folder, window=64, limit=2, device=device) for device in DEVICES
    ]
    here, there = ((result.perplexity, result.kl) for result in found)
    assert there == pytest.approx(here, rel=2e-3)


def test_the_same_text(checkpoint: Path) -> None:
    here, there = (swquant.generate(checkpoint, PROMPT, tokens=8, device=device) for device in DEVICES)
    assert there == here


@pytest.mark.parametrize("train", ["blocks", "scales"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tuned_there(folder: Path, checkpoint: Path, tmp_path: Path, train: str, precision: str) -> None:
    def make(device: str, out: Path) -> None:
        swquant.tune(checkpoint, out, against=folder, text=TEXT, device=device, block=16, budget="0.5bits", warmup=2,
                     train=train, precision=precision, **TRAINED)  # fmt: skip

    here, there = on_both(make, tmp_path)
    original, before = logits(folder), logits(checkpoint)
    lost_here, lost_there, lost = (float((item - original).norm()) for item in (logits(here), logits(there), before))
    assert lost_there != lost
    assert lost_there == pytest.approx(lost_here, rel=0.05)


def test_a_task_is_learned_there(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """It helps with the task as much as on the CPU."""
    (tmp_path / "text").write_text(TEXT)

    def make(device: str, out: Path) -> None:
        swquant.adapt(checkpoint, out, {"notes": tmp_path / "text"}, device=device, block=16, budget="0.5bits", texts=2,
                      warmup=2, **TRAINED)  # fmt: skip

    here, there = (
        swquant.evaluate(path, TEXT, window=32, limit=4, task="notes", device=device).perplexity
        for path, device in zip(on_both(make, tmp_path), DEVICES, strict=True)
    )
    assert there == pytest.approx(here, rel=0.02)


def test_merged_there(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    tuned = swquant.tune(checkpoint, tmp_path / "tuned", against=folder, text=TEXT, device="cpu", block=16,
                         budget="0.5bits", warmup=2, **TRAINED)  # fmt: skip
    assert tuned is not None
    found = [swquant.merge(tuned.path, tmp_path / device, texts=4, device=device).record for device in DEVICES]
    here, there = (record["kl_merged"] for record in found if record is not None)
    assert there == pytest.approx(here, rel=0.2)


def test_distilled_there(folder: Path, tmp_path: Path) -> None:
    def make(device: str, out: Path) -> None:
        swquant.distill(folder, out, layers="0-3,last", text=("sample", TEXT), device=device, kd_until="0.5", **TRAINED)

    here, there = on_both(make, tmp_path)
    torch.testing.assert_close(logits(there), logits(here), atol=2e-2, rtol=2e-2)


def test_a_mixture_is_trained_there(tmp_path: Path) -> None:
    model = planted_model("llama", tmp_path / "model").folder

    def make(device: str, out: Path) -> None:
        swquant.moe(model, out, experts="pyramid:2", text=("sample", TEXT), device=device, **TRAINED)

    here, there = on_both(make, tmp_path)
    torch.testing.assert_close(logits(there), logits(here), atol=2e-2, rtol=2e-2)


def test_a_gguf_has_the_same_types(tmp_path: Path) -> None:
    """What is in it is compared in export/gguf/test_elsewhere.py, on a pretended GPU."""
    plant(model := tiny_model("llama", vocab_size=384, hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "model")
    save_byte_level(tmp_path / "model")

    found = []
    for device in DEVICES:
        out = tmp_path / f"{device}.gguf"
        swquant.compress(tmp_path / "model", out, prompt=WORDS, format="gguf", type="Q4_K", device=device)
        found.append({item.name: item.tensor_type for item in gguf.GGUFReader(out).tensors})
    assert found[0] == found[1]
