"""What `compress` writes is what `calibrationless` computes, in files that depend on nothing but model and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_models import PROMPT, Planted, planted_model, read_config, save_model, tiny_model

import swquant
from calibrationless import QuantizedTensor, expand, parse_block, parse_clip, quantize, to_blocks
from exporters.sidecar import OUTLIERS, SIDECAR, SidecarReader
from swquant.checkpoints.compressed import CompressedCheckpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def decoded(quantized: QuantizedTensor) -> torch.Tensor:
    """(code - zero point) * scale, weight by weight, rounded once to the scale's dtype."""
    scale = expand(quantized.scale, quantized.block, quantized.shape)
    zero = 2.0 ** (quantized.bits - 1)
    if quantized.zero_point is not None:
        zero = expand(quantized.zero_point, quantized.block, quantized.shape).float()
    return ((quantized.codes.float() - zero) * scale.float()).to(scale.dtype)


def directly(weight: torch.Tensor, record: dict, options: dict) -> QuantizedTensor:
    """What the algorithm gives for one tensor; the block of a super weight is not clipped."""
    block = parse_block(record["block"])
    holds = torch.zeros(weight.shape, dtype=torch.bool)
    for point in record.get("super_weights", ()):
        holds[point["row"], point["col"]] = True
    return quantize(
        weight,
        block,
        record["bits"],
        symmetric=record["symmetric"],
        clip=parse_clip(options.get("clip", "none")),
        keep_extreme=to_blocks(holds, block).any(dim=1),
        scale_dtype=DTYPES.get(options.get("dtype", "auto")),
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def check_round_trip(source: Path, out: Path, options: dict) -> int:
    """Compare every quantized and every dense tensor with the source. Returns how many were quantized."""
    weights, manifest = read_weights(source), swquant.inspect(out)
    count = 0
    with CompressedCheckpoint(out) as checkpoint, CompressedCheckpoint(out, restored=False) as plain:
        assert set(checkpoint.tensors) == set(weights) - set(manifest["left_out"])
        for name, record in manifest["tensors"].items():
            if "dense" in record:
                expected = weights[name].to(DTYPES.get(options.get("dtype", "auto")))
                assert torch.equal(checkpoint.read(name), expected)
                continue
            count += 1
            expected, read = directly(weights[name], record, options), checkpoint.quantized(name)
            assert torch.equal(read.codes, expected.codes), name
            assert torch.equal(plain.read(name), decoded(expected)), name
            assert read.scale.dtype is expected.scale.dtype
            if record["outliers"]:
                check_outliers(out, name, weights[name], expected, checkpoint.read(name), record)
    return count


def check_outliers(
    out: Path, name: str, weight: torch.Tensor, rounded: QuantizedTensor, restored: torch.Tensor, record: dict
) -> None:
    reader = SidecarReader(out / SIDECAR)
    points = reader.read(OUTLIERS, name, tuple(weight.shape))
    reader.close()
    rows, cols = points.rows.long(), points.cols.long()
    assert len(points) == record["outliers"]
    assert torch.equal(points.values, weight[rows, cols])
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    kept[rows, cols] = True
    assert int(kept.sum()) == len(points)  # no point twice
    assert torch.equal(restored, torch.where(kept, weight.to(restored.dtype), decoded(rounded)))
    error = (decoded(rounded).float() - weight.float()).abs()
    for point in record.get("super_weights", ()):
        assert kept[point["row"], point["col"]]
        error[point["row"], point["col"]] = torch.inf
    assert error[kept].min() >= error[~kept].max()


OPTIONS = [
    {"preset": "fast"},
    {"bits": 2, "block": "32", "refine": "none"},
    {"bits": 3, "block": "channel", "refine": "none"},
    {"bits": 5, "block": "32x32", "outliers": 0.01, "refine": "none"},
    {"bits": 6, "block": "flat:32", "symmetric": False, "refine": "none"},
    {"bits": 7, "block": "tensor", "dtype": "float16", "refine": "none"},
    {"bits": 8, "block": "32", "symmetric": False, "outliers": 0.01, "dtype": "float32", "refine": "none"},
    {"bits": 4, "block": "128", "clip": "z=2", "outliers": 0.01},
    {"bits": 4, "block": "channel", "clip": "iqr=3", "restore": False},
    {"bits": 3, "block": "64x16", "clip": "quantile=0.98", "symmetric": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())) or "defaults")
def test_what_is_read_back_is_what_the_algorithm_computes(bf16_llama: Planted, tmp_path: Path, options: dict) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, **options).path
    assert check_round_trip(bf16_llama.folder, out, options) >= 41  # the super weight's tensor may stay dense
    assert swquant.verify(out) == []


@given(
    hidden=st.sampled_from([48, 80, 96]),
    intermediate=st.sampled_from([112, 144, 200]),
    dtype=st.sampled_from(list(DTYPES)),
    bits=st.integers(2, 8),
    block=st.sampled_from(["128", "24", "16x16", "channel", "tensor"]),
    symmetric=st.booleans(),
)
@settings(max_examples=20)
@pytest.mark.slow
def test_awkward_sizes_come_back_too(tmp_path_factory, hidden, intermediate, dtype, bits, block, symmetric):
    folder = tmp_path_factory.mktemp("awkward")
    model = tiny_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 16,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    source = save_model(model, folder / "model", DTYPES[dtype])
    options = {"bits": bits, "block": block, "symmetric": symmetric}
    out = swquant.compress(source, folder / "out", prompt=PROMPT, **options).path
    assert check_round_trip(source, out, options) >= 4
    assert swquant.verify(out) == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [{"outliers": 0.01, "clip": "z=4", "block": "channel"}, {"block": "64x64", "bits": 3, "symmetric": False}],
    ids=["channel", "tiles"],
)
def test_the_same_options_give_the_same_bytes_on_any_number_of_threads(
    wide_llama: Planted, tmp_path: Path, options: dict
) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            swquant.compress(wide_llama.folder, tmp_path / str(count), prompt=PROMPT, **options)
    finally:
        torch.set_num_threads(threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_folder_is_named_after_the_model_and_its_options(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = swquant.compress(bf16_llama.folder, prompt=PROMPT, bits=3, block="flat:64")
    assert result.path == Path("tiny-w3-bflat64")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-w3-bflat64"]


def test_shards_are_as_small_as_asked_and_the_index_knows_them(wide_llama: Planted, tmp_path: Path) -> None:
    options = {"bits": 8, "dtype": "float32", "prompt": PROMPT}  # 2.1 MB
    many = swquant.compress(wide_llama.folder, tmp_path / "many", shard_size="1MB", **options).path
    one = swquant.compress(wide_llama.folder, tmp_path / "one", **options).path
    index = json.loads((many / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in many.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) >= 3
    weights = {shard: load_file(many / shard) for shard in shards}
    for tensors in weights.values():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1_000_000
    assert index["weight_map"] == {name: shard for shard, tensors in weights.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    whole = read_weights(one)
    together = read_weights(many)
    assert whole.keys() == together.keys()
    assert all(torch.equal(whole[name], together[name]) for name in whole)


def test_a_source_in_several_shards_gives_what_a_single_file_gives(wide_llama: Planted, tmp_path: Path) -> None:
    assert len(list(wide_llama.folder.glob("*.safetensors"))) >= 3
    single = tmp_path / "wide"
    single.mkdir()
    for path in wide_llama.folder.glob("*.json"):
        if "index" not in path.name:
            (single / path.name).write_bytes(path.read_bytes())
    save_file(read_weights(wide_llama.folder), single / "model.safetensors", {"format": "pt"})
    swquant.compress(wide_llama.folder, tmp_path / "a", prompt=PROMPT)
    swquant.compress(single, tmp_path / "b", prompt=PROMPT)
    a, b = read_weights(tmp_path / "a"), read_weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_tied_embedding_is_written_once(tmp_path: Path) -> None:
    source = planted_model("llama", tmp_path / "tied", tie_word_embeddings=True).folder
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # some exporters store the copy
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert result.manifest["left_out"] == {"lm_head.weight": "tied to the embedding"}
    assert "lm_head.weight" not in read_weights(result.path)
    model = swquant.load(result.path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_the_configuration_keeps_what_the_source_said_and_adds_how_to_load_it(
    bf16_llama: Planted, tmp_path: Path
) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, dtype="float16").path
    before, after = read_config(bf16_llama.folder), read_config(out)
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after.pop("swquant")["sidecar"] == SIDECAR
    assert after == {**before, "dtype": "float16"}


def test_a_dense_value_that_float16_cannot_hold_is_an_error_not_an_infinity(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = 1e5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(swquant.SwquantError, match=r"input_layernorm.*float16"):
        swquant.compress(source, tmp_path / "out", prompt=PROMPT, dtype="float16", preset="fast")
