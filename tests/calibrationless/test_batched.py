"""The searches as batched torch: in every block as good as the compiled loops, and on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pretended import GPU, pretended_gpu
from torch import Tensor

from calibrationless import (
    Block,
    Channel,
    Evidence,
    Flat,
    Group,
    Recipe,
    Rounded,
    Tile,
    Whole,
    dequantize,
    follow,
    inverse_factor,
    loops,
    moved,
    to_blocks,
)  # fmt: skip

BLOCKS = [Group(16), Group(64), Tile(4, 32), Channel(), Whole(), Flat(48), Flat(256)]
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "zero points": {"symmetric": False},
    "offsets": {"offsets": "float", "scale_dtype": torch.float16},
    "bytes": {"offsets": "byte", "scale_dtype": torch.float16},
}


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "COMPILED", frozenset())


def weight_and_energy(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    weight = torch.randn(24, 192) * torch.logspace(-3, 2, 24).unsqueeze(1)
    weight[3], weight[5, :64], weight[7] = 0.0, 0.25, weight[7].abs()
    energy = torch.rand(192) ** 6
    energy[10:14] = 0.0
    return weight, energy


def recipes(block: Block) -> dict[str, Recipe]:
    within_rows = isinstance(block, Group | Channel)
    return {kind: Recipe(block, 4, **options) for kind, options in KINDS.items() if kind != "bytes" or within_rows}


def errors_of(rounded: Rounded, weight: Tensor, energy: Tensor, block: Block) -> Tensor:
    """float64 [blocks]: the weighted error of each block."""
    difference = (dequantize(rounded.quantized, torch.float32) - weight).double()
    return to_blocks(difference.square() * energy.clamp(min=1e-6 * float(energy.mean())), block).sum(dim=1)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_batched_torch_finds_what_the_compiled_loops_find(
    monkeypatch: pytest.MonkeyPatch, block: Block, bits: int
) -> None:
    for kind, recipe in recipes(block).items():
        recipe = Recipe(**{**recipe.__dict__, "bits": bits})
        weight, energy = weight_and_energy(bits)
        compiled = follow(recipe, weight, Evidence(energy, energy))
        monkeypatch.setattr(loops, "COMPILED", frozenset())
        plain = follow(recipe, weight, Evidence(energy, energy))
        monkeypatch.undo()
        ours, theirs = (errors_of(rounded, weight, energy, block) for rounded in (plain, compiled))
        total = to_blocks(weight.double().square() * energy, block).sum(dim=1)
        # Of 8 bits the errors are as small as what float32 can tell of the sums: a line through 256 codes takes sums of
        # squares up to 65,025 from one another.
        if bits < 8:
            alike = (ours - theirs).abs() <= 0.02 * theirs + 5e-6 * total
            assert float(alike.double().mean()) > 0.99, kind  # the last bit of a sum decides between two equals
        assert plain.error.output == pytest.approx(compiled.error.output, rel=1e-3 if bits < 8 else 0.1), kind


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_gives_what_batched_torch_gives_on_the_cpu(batched: None, kind: str) -> None:
    """With feedback, outliers, blocks that keep their extreme; a tensor made in the wrong place would stop it."""
    weight, energy = weight_and_energy()
    inputs = torch.randn(400, 192)
    for super_weights, outliers in (((), 0), (((2, 5), (9, 100)), 0), (((2, 5),), 30)):
        recipe = Recipe(Group(32), 4, **KINDS[kind], super_weights=super_weights, outliers=outliers)
        evidence = Evidence(energy, energy, inverse_factor(inputs.T @ inputs))
        here = follow(recipe, weight, evidence)
        with pretended_gpu() as gpu:
            there = follow(recipe, weight.to(gpu), moved(evidence, gpu))
            assert there.quantized.codes.device == GPU
            back = moved(there, "cpu")
        assert torch.equal(back.quantized.codes, here.quantized.codes)
        assert torch.equal(back.quantized.scale, here.quantized.scale)
        assert back.error == here.error
        for name, patch in here.patches.items():
            assert torch.equal(back.patches[name].values, patch.values)  # type: ignore[attr-defined]


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu() as gpu:
        there = torch.ones(3, device=gpu)
        assert (there + 1).device == gpu
        assert float(there.sum()) == 3
        with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
            there + torch.ones(3)


def test_a_factor_is_made_where_the_inputs_are() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 48)
    order, upper = inverse_factor(inputs.T @ inputs)
    with pretended_gpu() as gpu:
        there = inverse_factor((inputs.T @ inputs).to(gpu))
        assert [item.device for item in there] == [GPU, GPU]
        assert torch.equal(there[0].cpu(), order)
        assert torch.equal(there[1].cpu(), upper)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_as_good_as_the_compiled_loops(kind: str) -> None:
    torch.manual_seed(0)
    weight, energy = torch.randn(1024, 4096) * 0.02, torch.rand(4096) ** 6
    recipe, evidence = Recipe(Group(64), 4, **KINDS[kind], outliers=2000), Evidence(energy, energy)
    here = follow(recipe, weight, evidence)
    there = moved(follow(recipe, weight.cuda(), moved(evidence, "cuda")), "cpu")
    assert there.error.output == pytest.approx(here.error.output, rel=1e-3)
    assert float((there.quantized.codes != here.quantized.codes).float().mean()) < 0.02
