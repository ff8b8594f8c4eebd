"""vLLM with swquant-vllm predicts what `swquant.load` does, and without it clearly something else.

Both sides run every case, so that a plugin that does nothing fails. vLLM computes in bfloat16, `swquant.load` here in
float32: what is left of the divergence with the plugin is that, as `swquant.load` in bfloat16 shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support.paths import PROJECT
from support.real_models import GEMMA, SMOLLM2, real_model
from support.tiny_models import PROMPT, planted_model, sample_text
from support.vllm_environment import needs_vllm, vllm_on
from torch import Tensor

import swquant
from exporters.sidecar import SIDECAR
from swquant.checkpoints.manifest import MANIFEST

pytestmark = pytest.mark.vllm

TOP = 1000  # of the likeliest tokens; all others count as one
WINDOW, WINDOWS = 120, 3
GOAL = 0.002  # nats per token; Gemma in bfloat16 is further than that from itself in float32


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    needs_vllm()


def predictions(folder: Path, texts: list[list[int]], dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Log-probabilities of each token but the first of each text, by `swquant.load`."""
    model = swquant.load(folder, dtype=dtype)
    for text in texts:
        with torch.no_grad():
            yield from model(torch.tensor([text])).logits[0, :-1].float().log_softmax(-1)


def divergence(folder: Path, said: list[dict[str, Any]]) -> float:
    """KL in nats per token, `swquant.load` to vLLM, over the likeliest tokens of vLLM and the rest as one."""
    texts = [text["tokens"][: len(text["top"]) + 1] for text in said]
    top = [token for text in said for token in text["top"]]
    found = [
        _with_rest(ours[tokens]).exp() @ (_with_rest(ours[tokens]) - _with_rest(torch.tensor(theirs)))
        for ours, (tokens, theirs) in zip(predictions(folder, texts), top, strict=True)
    ]
    return float(torch.stack(found).mean())


def of_bfloat16(folder: Path, texts: list[list[int]]) -> float:
    """The same, to `swquant.load` in bfloat16."""
    pairs = zip(predictions(folder, texts), predictions(folder, texts, torch.bfloat16), strict=True)
    return float(torch.stack([exact.exp() @ (exact - rounded) for exact, rounded in pairs]).mean())


def _with_rest(logs: Tensor) -> Tensor:
    rest = (1 - logs.double().exp().sum()).clamp(min=1e-9)
    return torch.cat([logs.double(), rest.log().unsqueeze(0)])


def both(folder: Path, prompts: list[list[int]], root: Path, **asked: Any) -> tuple[float, float]:
    """The divergence with and without the plugin."""
    found = []
    for plugin in (True, False):
        said = vllm_on({"it": folder}, prompts, root / f"{plugin}", plugin=plugin, tokens=1, **asked)["it"]
        assert isinstance(said, list), said
        found.append(divergence(folder, said))
    print(f"{folder.name}: KL {found[0]:.5f} with the plugin, {found[1]:.5f} without")
    return found[0], found[1]


def compressed(source: Path, out: Path, **options: Any) -> Path:
    return swquant.compress(real_model(source), out, **options).path


def tuned(
    source: Path, out: Path, lr: str = "1e-3", budget: str = "0.2bits", select: str | None = None, **options: Any
) -> Path:
    """A checkpoint with blocks over it, of a size that divides no shape of SmolLM2's."""
    made = swquant.compress(source, out.with_name("base"), **options).path
    short = {"block": 24, "steps": 4, "warmup": 2, "window": 32, "texts": 8}
    result = swquant.tune(made, out, against=source, lr=lr, budget=budget, select=select, **short)
    assert result is not None
    return result.path


REAL: dict[str, Callable[[Path], Path]] = {
    "smollm2": partial(compressed, SMOLLM2),
    "smollm2 tuned": partial(tuned, SMOLLM2),
    "gemma": partial(compressed, GEMMA),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_predicts_what_swquant_does(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = REAL[name](tmp_path / name.replace(" ", "-"))
    text = (PROJECT / "data/wikitext2-excerpt.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text[:4000])["input_ids"]
    prompts = [ids[at * WINDOW : (at + 1) * WINDOW] for at in range(WINDOWS)]
    with_plugin, without = both(folder, prompts, tmp_path, top=TOP)
    rounded = of_bfloat16(folder, prompts)
    print(f"swquant.load in bfloat16: KL {rounded:.5f}")
    assert with_plugin < max(GOAL, 2 * rounded)
    assert without > 10 * with_plugin


def test_w8a8_keeps_its_channels(tmp_path: Path) -> None:
    """Inputs are rounded on both sides, where a little less or more falls on another integer: nearer, not equal."""
    from transformers import AutoTokenizer

    folder = compressed(SMOLLM2, tmp_path / "w8a8", bits=8, activations="int8")
    text = (PROJECT / "data/wikitext2-excerpt.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text[:4000])["input_ids"]
    prompts = [ids[at * WINDOW : (at + 1) * WINDOW] for at in range(WINDOWS)]
    with_plugin, without = both(folder, prompts, tmp_path, top=TOP)
    assert without > 2 * with_plugin


TINY = {"block": "32", "prompt": PROMPT, "preset": "fast", "outliers": 0.02}
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "llama": ("llama", {"head_dim": 32}, {}, 1),
    "asymmetric": ("llama", {"head_dim": 32}, {"symmetric": False}, 1),
    "fused in the file": ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 2}, {}, 1),
    "two ranks, one head of keys": (
        "llama",
        {"head_dim": 32, "num_key_value_heads": 1},
        {"dense": ("down_proj",), "select": "random"},
        2,
    ),
    "of a later version": ("llama", {"head_dim": 32}, {}, 1),
}


def with_another_version(folder: Path) -> Path:
    """The sidecar says that it is of a later version, and the manifest knows its bytes."""
    with safe_open(folder / SIDECAR, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(folder / SIDECAR)
    safetensors.torch.save_file(tensors, folder / SIDECAR, {**metadata, "version": "2"})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][SIDECAR]["sha256"] = hashlib.sha256((folder / SIDECAR).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """Name -> its folder, what vLLM says of it with the plugin, and without. vLLM is asked once for all of a kind,
    since it takes longer to start than to answer."""
    root, folders = tmp_path_factory.mktemp("tiny"), {}
    for name, (architecture, shape, options, _) in SHAPES.items():
        here = root / name.replace(" ", "-").replace(",", "")
        source = planted_model(architecture, here / "model", **shape).folder
        folders[name] = tuned(source, here / "out", "3e-2", "2bits", **TINY, **options)
    with_another_version(folders["of a later version"])
    prompts = [[int(word[1:]) for word in sample_text(100).split()]]
    said: dict[str, list[Any]] = {name: [] for name in folders}
    for plugin in (True, False):
        for ranks in (1, 2):
            asked = {name: folder for name, folder in folders.items() if SHAPES[name][3] == ranks}
            answers = vllm_on(asked, prompts, root / "answer", plugin=plugin, tokens=1, top=100, ranks=ranks)
            for name, answer in answers.items():
                said[name].append(answer)
    return {name: (folder, *said[name]) for name, folder in folders.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_however_a_layer_is_cut_and_fused(name: str, tiny: dict[str, tuple[Path, Any, Any]]) -> None:
    folder, with_plugin, without = tiny[name]
    assert isinstance(without, list), without
    if name == "of a later version":
        assert "not swquant-patches 1, the version that is known; update swquant-vllm" in with_plugin["refusal"]
        return
    assert isinstance(with_plugin, list), with_plugin
    patched = [record for record in swquant.inspect(folder)["tensors"].values() if record.get("blocks")]
    assert any("dense" in record for record in patched) or "dense" not in SHAPES[name][2]
    found = divergence(folder, with_plugin), divergence(folder, without)
    print(f"{name}: KL {found[0]:.6f} with the plugin, {found[1]:.6f} without")
    assert found[1] > 20 * found[0]
