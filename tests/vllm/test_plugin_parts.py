"""The parts of swquant-vllm that need no vLLM, held against swquant: what it reads, and what a rank adds."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import PROJECT
from torch import Tensor

from calibrationless import Blocks, Channel, Group, Patch, Points, dequantize, quantize, restore
from exporters import layouts
from exporters.sidecar import PlannedPatch, SidecarWriter
from swquant_vllm import added
from swquant_vllm.sidecar import MANIFEST, SIDECAR, Checkpoint, SidecarError, fetched, open_checkpoint

OUT, IN = 128, 192
SIDE = 20  # divides neither, nor what a rank has of them
NAME = "model.layers.0.mlp.up_proj.weight"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(count: int, rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """Different ones, as int32."""
    flat = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return (flat // cols).int(), (flat % cols).int()


def all_kinds() -> dict[str, Patch]:
    """Points, blocks that are added over some of them, and blocks that replace some of those."""
    grid = (-(-OUT // SIDE), -(-IN // SIDE))
    return {
        "outliers": Points(*places(300, OUT, IN, 1), random(300, seed=2)),
        "tuned": Blocks(*places(25, *grid, 3), random(25, SIDE, SIDE, seed=4)),
        "again": Blocks(*places(9, *grid, 5), random(9, SIDE, SIDE, seed=6).bfloat16(), "replace"),
    }


def save(folder: Path, patches: dict[str, Patch], channels: tuple[Any, ...] | None = None) -> Path:
    """What a checkpoint's folder swquant/ holds, as far as loaders read it."""
    (folder / "swquant").mkdir(parents=True)
    writer = SidecarWriter(
        folder / SIDECAR,
        [
            PlannedPatch(name, NAME, len(patch), (OUT, IN), patch.values.dtype, patch.values.shape[-1], patch.mode)
            for name, patch in patches.items()
        ],
    )
    for name, patch in patches.items():
        writer.write(name, NAME, patch)
    writer.finish()
    record = {} if channels is None else {"inputs": {"channels": list(channels)}}
    manifest = {"format": "swquant-manifest", "version": 1, "tensors": {NAME: record}, "files": {}}
    manifest["activations"] = None if channels is None else {"declared": True}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return sign(folder)


def sign(folder: Path) -> Path:
    """The manifest names the sidecar's bytes as they are."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][SIDECAR] = {"sha256": hashlib.sha256((folder / SIDECAR).read_bytes()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save(tmp_path_factory.mktemp("checkpoint"), all_kinds()))


def cut(parts: dict[str, Tensor], bits: int, rows: slice, cols: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """What vLLM gives a rank of the stored parts: words hold 32 / bits codes, of a row or (zeros) of a column."""

    def words(codes: slice) -> slice:
        return slice(codes.start * bits // 32, codes.stop * bits // 32)

    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    groups = slice(cols.start * scale.shape[1] // IN, max(cols.stop * scale.shape[1] // IN, 1))
    packed = parts["weight"][rows, cols] if "weight" in parts else parts["weight_packed"][rows, words(cols)]
    return packed, scale[rows, groups], None if zero is None else zero[words(rows), groups]


def held(rows: slice, cols: slice) -> added.Part:
    def numbers(size: int, part: slice) -> Tensor:
        return added.positions(torch.arange(size)[part], size)

    return added.Part(NAME, numbers(OUT, rows), numbers(IN, cols))


WHOLE = (slice(0, OUT), slice(0, IN))
HALVES = {
    "whole": [WHOLE],
    "rows": [(slice(at, at + 64), WHOLE[1]) for at in (0, 64)],
    "columns": [(WHOLE[0], slice(at, at + 64)) for at in (0, 64, 128)],
}


@pytest.mark.parametrize("split", HALVES)
@pytest.mark.parametrize(
    ("bits", "options", "int8"),
    [(4, {}, False), (4, {"symmetric": False}, False), (3, {"symmetric": False}, False), (5, {}, False), (8, {}, True)],
)
def test_ranks_together_compute_what_swquant_does(
    split: str, bits: int, options: dict[str, Any], int8: bool, checkpoint: Checkpoint
) -> None:
    quantized = quantize(random(OUT, IN), Channel() if int8 else Group(64), bits, scale_dtype=torch.float32, **options)
    parts = layouts.to_tensors(quantized, int8_inputs=int8)
    decoded = dequantize(quantized)
    x, y = random(2, 3, IN, seed=9), torch.zeros(2, 3, OUT)
    for rows, cols in HALVES[split]:
        width = cols.stop - cols.start
        at = added.decode(*cut(parts, bits, rows, cols), width)
        everywhere = at(torch.arange(rows.stop - rows.start).unsqueeze(1), torch.arange(width).unsqueeze(0))
        assert torch.equal(everywhere, decoded[rows, cols])
        patches = [added.taken(patch, held(rows, cols)) for patch in checkpoint.patches(NAME, (OUT, IN))]
        part = x[..., cols] @ decoded[rows, cols].T
        for module in added.modules(added.differences(patches, at, width), torch.float32):
            module(x[..., cols], part)
        y[..., rows] += part
    expected = x @ restore(decoded.clone(), *all_kinds().values()).T
    assert torch.allclose(y, expected, atol=1e-4)
    assert not torch.allclose(x @ decoded.T, expected, atol=1e-1)


def test_a_fused_layer_has_the_weight_after_another() -> None:
    here = torch.cat([torch.full((10,), -1), torch.arange(30, 50), torch.full((5,), -1)])
    found = added.positions(here, 64)
    assert torch.equal(found[30:50], torch.arange(10, 30))
    assert int((found >= 0).sum()) == 20


def test_columns_are_hidden_from_the_kernel_and_added_in_float() -> None:
    weight, x, cols = random(8, 16), random(3, 16, seed=1), torch.tensor([2, 11])
    columns = added.Columns(cols, weight[:, cols].T.contiguous())
    seen = columns.hidden(x)
    assert not seen[:, cols].any()
    y = seen @ weight.T
    columns(x, y)
    assert torch.allclose(y, x @ weight.T, atol=1e-5)


def test_a_checkpoint_without_a_sidecar_has_channels_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", {}, (3, 7))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": {}}))
    found = open_checkpoint(folder)
    assert (found.path, found.patches(NAME, (OUT, IN)), found.kept(NAME, IN)) == (None, [], (3, 7))
    assert found.kept("another", IN) == ()
    assert fetched(str(folder), None) == folder


@pytest.mark.parametrize("channels", [(-1,), (IN,), (True,), ("3",), (1.0,)])
def test_channels_outside_the_weight_are_refused(channels: tuple[Any, ...], tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path / "c", all_kinds(), channels))
    with pytest.raises(SidecarError, match="kept channels"):
        found.kept(NAME, IN)


def of_set(name: str, part: str) -> str:
    return f"{name}/{NAME}.{part}"


BAD_TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "row outside": lambda t: t[of_set("outliers", "rows")].__setitem__(0, OUT),
    "negative": lambda t: t[of_set("tuned", "cols")].__setitem__(0, -1),
    "block outside": lambda t: t[of_set("tuned", "rows")].__setitem__(0, -(-OUT // SIDE)),
    "NaN": lambda t: t[of_set("tuned", "values")].fill_(float("nan")),
    "twice": lambda t: [t[of_set("again", part)].fill_(0) for part in ("rows", "cols")],
    "floats": lambda t: t.update({of_set("outliers", "rows"): t[of_set("outliers", "rows")].float()}),
    "fewer values": lambda t: t.update({of_set("outliers", "values"): t[of_set("outliers", "values")][1:]}),
    "values of integers": lambda t: t.update({of_set("outliers", "values"): t[of_set("outliers", "values")].int()}),
    "no squares": lambda t: t.update({of_set("tuned", "values"): t[of_set("tuned", "values")][:, 1:].contiguous()}),
    "flat blocks": lambda t: t.update({of_set("tuned", "values"): t[of_set("tuned", "values")][:, 0, 0].contiguous()}),
    "no size": lambda t: t.update({of_set("tuned", "values"): torch.zeros(25, 0, 0)}),
}


@pytest.mark.parametrize("damage", BAD_TENSORS)
def test_patches_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "c", all_kinds())
    tensors, metadata = load_file(folder / SIDECAR), _metadata(folder / SIDECAR)
    BAD_TENSORS[damage](tensors)
    save_file(tensors, folder / SIDECAR, metadata)
    found = open_checkpoint(sign(folder))
    with pytest.raises(SidecarError, match="do not fit a weight of") as refused:
        found.patches(NAME, (OUT, IN))
    assert "\n" not in str(refused.value)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


SETS = json.dumps({"outliers": {"kind": "points", "mode": "replace"}})
BAD_FILES: dict[str, tuple[dict[str, str], str, str]] = {
    "version": ({"format": "swquant-patches", "version": "2", "sets": SETS}, "outliers", "not swquant-patches 1"),
    "format": ({}, "outliers", "not swquant-patches 1"),
    "kind": ({"sets": '{"outliers": {"kind": "rows", "mode": "replace"}}'}, "outliers", "unknown sets"),
    "mode": ({"sets": '{"x": {"kind": "blocks", "mode": "multiply"}}'}, "x", "unknown sets"),
    "more": ({"sets": '{"x": {"kind": "blocks", "mode": "add", "scale": 2}}'}, "x", "unknown sets"),
    "no JSON": ({"sets": "{"}, "x", "unknown sets"),
    "no object": ({"sets": "[1]"}, "x", "unknown sets"),
    "deep": ({"sets": "[" * 10_000}, "x", "unknown sets"),
    "of no set": ({"sets": SETS}, "tuned", "has parts that no set has"),
    "a name of two lines": ({"sets": SETS}, "outliers/a\nb", "has parts that no set has"),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_sidecars_that_are_not_known_are_refused(damage: str, tmp_path: Path) -> None:
    metadata, name, message = BAD_FILES[damage]
    folder = save(tmp_path / "c", {})
    tensors = {of_set(name, part): torch.zeros(1, dtype=torch.int32) for part in ("rows", "cols", "values")}
    known = {"format": "swquant-patches", "version": "1"} if metadata else {}
    save_file(tensors, folder / SIDECAR, known | metadata)
    with pytest.raises(SidecarError, match=message) as refused:
        open_checkpoint(sign(folder))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SIDECAR).unlink(), "No such file"),
        (lambda folder: (folder / SIDECAR).write_bytes(b"x"), "its bytes are not those"),
        (lambda folder: (folder / MANIFEST).unlink(), "no manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "no manifest"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"format": "swquant-manifest", "version": 2}'),
            "not swquant-m",
        ),
        (lambda folder: (folder / MANIFEST).write_text('{"format": "swquant-manifest", "version": 1}'), "no manifest"),
    ],
)
def test_what_is_missing_or_damaged_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "c", all_kinds())
    damage(folder)
    with pytest.raises(SidecarError, match=message):
        open_checkpoint(folder)


def test_a_sidecar_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", all_kinds())
    (folder / SIDECAR).write_bytes(b"\xff" * 100)
    with pytest.raises(SidecarError, match="fetch it again"):
        open_checkpoint(sign(folder))


def test_its_archives_hold_the_license() -> None:
    folder = PROJECT / "plugins/vllm"
    assert (folder / "LICENSE").read_bytes() == (PROJECT / "LICENSE").read_bytes()
    assert tomllib.loads((folder / "pyproject.toml").read_text())["project"]["license-files"] == ["LICENSE"]
