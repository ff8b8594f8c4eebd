"""The quality benchmark counts what is stored, decodes what other tools pack, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import plant, save_model, save_tokenizer, tiny_model

import swquant


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import peers

    return peers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    tiny = tiny_model("llama")
    plant(tiny)
    save_model(tiny, folder)
    save_tokenizer(folder)
    return folder


def bitstream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint codes [in, out] -> int32 [in * bits / 32, out], code after code from the lowest bit: GPTQ's layout."""
    words = []
    for column in codes.T.tolist():
        number = sum(code << (bits * index) for index, code in enumerate(column))
        words.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).T


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_words_are_unpacked(peers: ModuleType, bits: int) -> None:
    from peers.calibrated import decode

    codes = torch.randint(0, 1 << bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    scales = torch.rand(2, 5).half()
    index = torch.arange(64, dtype=torch.int32) // 32
    parts = {"qweight": bitstream(codes, bits), "scales": scales, "g_idx": index}
    weight, nbytes = decode(parts, bits, awq=False)
    expected = (codes - (1 << (bits - 1))) * scales.float().repeat_interleave(32, dim=0)
    assert torch.equal(weight, expected.T)
    assert nbytes == 64 * 5 * bits // 8 + 2 * 5 * 2


def test_a_block_that_does_not_divide_a_row_is_halved(peers: ModuleType) -> None:
    from peers.base import group_of

    assert [group_of(peers.Cell(4, block), 576) for block in ("64", "128", "channel")] == [64, 64, 576]


def test_own_rows_decode_and_count_every_byte(peers: ModuleType, model: Path) -> None:
    from peers import own

    cell = peers.Cell(4, "32")
    original = peers.open_original(model, "")
    outcome = own.row("some", outliers=0.001).run(original, cell)
    result = swquant.compress(model, model.parent / "out", bits=4, block="32", dtype="bfloat16", outliers=0.001)
    loaded = swquant.load(result.path, dtype=torch.float32).state_dict()
    assert set(outcome.state) >= set(original.linears)
    assert all(torch.equal(outcome.state[name], loaded[name]) for name in original.linears)
    sidecar = (result.path / "swquant/outliers.safetensors").stat().st_size
    stored = sum(result.manifest["tensors"][name]["bytes"] for name in original.linears)
    assert outcome.nbytes == stored + sidecar


def test_min_max_rounding_closes_nothing_and_the_original_everything(peers: ModuleType) -> None:
    from quality_report import closed

    def record(method: str, perplexity: float) -> dict[str, object]:
        return {"model": "m", "cell": "4-64", "method": method, "texts": {"wikitext2-test": {"perplexity": perplexity}}}

    rows = [record("min/max rounding", 30.0), record("perfect", 20.0), record("half", 25.0), record("worse", 40.0)]
    originals = {"m": {"texts": {"wikitext2-test": {"perplexity": 20.0}}}}
    assert [closed(row, originals, rows) for row in rows] == [0.0, 1.0, 0.5, -1.0]


def test_results_are_kept_and_replaced(peers: ModuleType, tmp_path: Path) -> None:
    from quality import Results

    path = tmp_path / "results.json"
    key = {"model": "m", "cell": "4-64", "method": "some"}
    Results(path).put({**key, "bits": 4.0})
    again = Results(path)
    assert again.find(("m", "4-64", "some")) == {**key, "bits": 4.0}
    again.put({**key, "bits": 5.0})
    assert [record["bits"] for record in json.loads(path.read_text())["results"]] == [5.0]
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_ggml_shares_rows_among_threads(peers: ModuleType) -> None:
    pytest.importorskip("libggml")
    from peers import ggml

    weight = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    for name in ("Q4_0", "Q4_K"):
        packed = ggml.quantize(weight, name)
        assert torch.equal(packed, ggml.quantize(weight, name, threads=2))
        decoded = ggml.dequantize(packed, name, (8, 576))
        assert float((decoded - weight).norm() / weight.norm()) < 0.1


def test_the_tables_of_the_documentation_are_those_of_the_results(peers: ModuleType) -> None:
    from quality_report import tables

    recorded = json.loads((PROJECT / "benchmarks" / "results" / "quality.json").read_text())
    written = (PROJECT / "docs" / "quality-tables.md").read_text(encoding="utf-8")
    assert written == tables(recorded["originals"], recorded["results"])


def test_the_readme_quotes_the_results(peers: ModuleType) -> None:
    """Every row of README's table is a record: the same bits, divergence and perplexity."""
    recorded = json.loads((PROJECT / "benchmarks" / "results" / "quality.json").read_text())
    of_smollm2 = {
        (f"{item['bits']:.2f}", f"{texts['kl']:.3f}", f"{texts['perplexity']:.1f}")
        for item in recorded["results"]
        if item["model"] == "smollm2" and (texts := item.get("texts", {}).get("wikitext2-test")) and texts["perplexity"]
    }
    table = (PROJECT / "README.md").read_text(encoding="utf-8").split("| SmolLM2-135M, original")[1].split("\n\n")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[3:6]] for line in table.splitlines()[2:]]
    assert len(rows) > 8
    assert [row for row in rows if tuple(row) not in of_smollm2] == []
