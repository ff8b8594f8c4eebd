"""Behind the length at which its arithmetic changes, an exported model is still the checkpoint; and what is refused,
because it would not be."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from support.command_line import Cli
from support.exported import SETTINGS, torch_model
from support.tiny_models import PROMPT, Planted, save_model, tiny_model
from transformers import PreTrainedModel

import swquant
from swquant.export.onnx import graph, lengths
from swquant.export.onnx.check import make_long_reference
from swquant.models.onnx_model import OnnxModel

pytest.importorskip("onnxruntime")

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0],
}
_LONG = {"original_max_position_embeddings": 32, "rope_parameters": _LONGROPE}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
# name -> (architecture, changes of its configuration, length that the check runs: 8 behind the change)
KINDS: dict[str, tuple[str, dict, int | None]] = {
    "window": ("mistral", {"sliding_window": 8}, 16),
    "window in some layers": ("gemma3", {"sliding_window": 8, "num_hidden_layers": 6}, 16),
    "longrope": ("phi3", {"num_key_value_heads": 4, "sliding_window": None, **_LONG}, 40),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}, None),
    "yarn": ("llama", {"rope_parameters": _YARN}, None),
    "dynamic": ("llama", {"max_position_embeddings": 32, "rope_parameters": _DYNAMIC}, 40),
}


def _model(architecture: str, **changes: object) -> PreTrainedModel:
    """Of two layers; transformers writes into the parameters of rotary embeddings that it is given, hence the copy."""
    return tiny_model(architecture, **deepcopy({"num_hidden_layers": 2, "intermediate_size": 96, **changes}))


def _compressed(kind: str, folder: Path) -> Path:
    architecture, changes, _ = KINDS[kind]
    save_model(_model(architecture, **changes), folder / "model")
    return swquant.compress(folder / "model", folder / "out", **SETTINGS).path


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        ("genai", "window"),
        ("dynamo", "dynamic"),
        *(pytest.param("dynamo", kind, marks=pytest.mark.slow) for kind in KINDS if kind != "dynamic"),
        *(
            pytest.param("genai", kind, marks=pytest.mark.slow)
            for kind in KINDS
            if kind not in ("window", "dynamic", "yarn")
        ),
    ],
)
def test_behind_the_change_the_graph_is_still_the_model(graph: str, kind: str, tmp_path: Path) -> None:
    if graph == "genai":
        pytest.importorskip("onnxruntime_genai")
    checkpoint = _compressed(kind, tmp_path)
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph=graph).path
    check = swquant.inspect(folder)["check"]
    assert check.get("long_tokens") == KINDS[kind][2]
    assert "unreached" not in check
    model = OnnxModel.open(folder / "model.onnx", None)
    ids = torch.randint(2, 128, (1, 48), generator=torch.Generator().manual_seed(1))
    for cuts in ([0, 48], [0, 6, *range(7, 12), 30, *range(31, 49)]):  # at once; one by one past 8 and past 32
        reference, past, kept, ours, theirs = torch_model(checkpoint), None, model.empty_past(1), [], []
        for start, stop in pairwise(cuts):
            with torch.no_grad():
                output = reference(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
            logits, kept = model.step(ids[:, start:stop].numpy(), kept)
            past = output.past_key_values
            ours.append(logits)
            theirs.append(output.logits.numpy())
        expected = np.concatenate(theirs, axis=1)
        assert np.abs(np.concatenate(ours, axis=1) - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.slow
def test_every_attention_of_the_builders_graph_has_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it had none, the check would see it."""
    pytest.importorskip("onnxruntime_genai")
    checkpoint = _compressed("window", tmp_path)
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph="genai").path
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    windows = [item.i for node in attentions for item in node.attribute if item.name == "local_window_size"]
    assert windows == [8, 8]
    monkeypatch.setattr(graph, "set_windows", lambda *_: None)
    with pytest.raises(swquant.SwquantError, match=r"differs from the checkpoint .*nothing was written"):
        swquant.export(checkpoint, tmp_path / "again", graph="genai")


def test_a_change_that_only_the_longer_text_reaches_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 40 lies behind the prompt and the sixteen tokens after it."""
    pytest.importorskip("onnxruntime_genai")
    save_model(_model("mistral", sliding_window=40), tmp_path / "model")
    checkpoint = swquant.compress(tmp_path / "model", tmp_path / "out", **SETTINGS).path
    monkeypatch.setattr(graph, "set_windows", lambda *_: None)
    with pytest.raises(swquant.SwquantError, match=r"differs from the checkpoint on 48 tokens, a length at which"):
        swquant.export(checkpoint, tmp_path / "onnx", graph="genai")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_what_the_check_cannot_afford_is_said(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(_model("mistral", num_hidden_layers=1, sliding_window=8), tmp_path / "model")
    checkpoint = swquant.compress(tmp_path / "model", tmp_path / "out", **SETTINGS).path
    monkeypatch.setattr(lengths, "_TOKENS", 10)
    ran = cli("export", checkpoint, tmp_path / "onnx")
    assert ran.code == 0
    assert "Not checked on more than 8 tokens" in " ".join(ran.out.split())
    check = swquant.inspect(tmp_path / "onnx")["check"]
    assert (check["unreached"], check.get("long_tokens")) == ([8], None)


def test_a_model_that_does_not_change_is_checked_as_before(exported: Path) -> None:
    assert not {"long_tokens", "unreached"} & swquant.inspect(exported)["check"].keys()
    assert make_long_reference(tiny_model("llama", num_hidden_layers=1)) is None


def test_where_arithmetic_changes_is_read_from_the_configuration() -> None:
    for architecture, changes, expected in (
        ("llama", {}, ()),
        ("mistral", {"sliding_window": 8}, (8,)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 128}, ()),  # no position lies behind it
        ("gemma3", {"sliding_window": 8}, (8,)),
        ("gemma3", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, ()),
        ("phi3", {"sliding_window": 8, **_LONG}, (8, 32)),
        ("llama", {"rope_parameters": _DYNAMIC}, (128,)),
        ("llama", {"rope_parameters": _YARN}, ()),
    ):
        assert lengths.changes_of(_model(architecture, **changes).config) == expected, (architecture, changes)


def test_pieces_are_single_tokens_past_every_change() -> None:
    sizes = [piece.stop - piece.start for piece in lengths.pieces_of((8, 64), 72)]
    assert sizes == [4, *[1] * 12, 44, *[1] * 12]
    assert [piece.stop - piece.start for piece in lengths.pieces_of((2,), 10)] == [1] * 10


def test_how_far_a_check_goes_depends_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(vocabulary: int, weights: int) -> SimpleNamespace:
        text = SimpleNamespace(vocab_size=vocabulary)
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), num_parameters=lambda: weights)

    assert lengths.reached(model(32_000, 10**8), (512, 4096, 5000)) == (512, 4096)
    assert lengths.reached(model(256_000, 10**8), (512, 4096)) == (512,)  # a GiB of logits
    assert lengths.reached(model(32_000, 7 * 10**9), (512, 4096)) == (512,)  # minutes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 256}, "it takes model.layers.0.self_attn.[kv]_proj for the output head"),
        ({"intermediate_size": 128}, "it takes model.layers.0.mlp.(gate|up)_proj for the output head"),
        (KINDS["dynamic"][1], "rotary table ends where rope type dynamic begins"),
        (KINDS["yarn"][1], "plain rotary embeddings where a llama has rope type yarn"),
    ],
    ids=["heads as wide as the vocabulary", "an MLP as wide", "dynamic", "yarn"],
)
def test_what_the_builder_would_draw_wrong_is_refused_before_the_work(
    changes: dict, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the size of `wide_llama`: two heads of 64 for keys, and a vocabulary of 128."""
    from swquant.export.onnx import pipeline

    for name in ("build_model", "written"):
        monkeypatch.setattr(pipeline, name, None)  # would be a TypeError if it came that far
    save_model(_model("llama", **changes), tmp_path / "model")
    checkpoint = swquant.compress(tmp_path / "model", tmp_path / "out", **SETTINGS).path
    with pytest.raises(swquant.SwquantError, match=f"{reason}.*; use --graph dynamo"):
        swquant.export(checkpoint, tmp_path / "onnx", graph="genai")
    with pytest.raises(swquant.SwquantError, match=f"{reason}.*; use --graph dynamo"):
        swquant.compress(tmp_path / "model", tmp_path / "onnx", format="onnx", graph="genai", **SETTINGS)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 4])
def test_the_wide_llama_goes_through_torchs_exporter(wide_llama: Planted, level: int, tmp_path: Path) -> None:
    checkpoint = swquant.compress(wide_llama.folder, tmp_path / "out", prompt=PROMPT, block="32").path
    check = swquant.inspect(swquant.export(checkpoint, tmp_path / "onnx", accuracy_level=level).path)["check"]
    assert check["largest_difference"] < (0.1 if level else 1e-4)
