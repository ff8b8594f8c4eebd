"""What transformers rearranges while loading is read as its own loader makes it, all else as it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import every_architecture
from support.tiny_models import Planted
from transformers import AutoModelForCausalLM

from swquant.checkpoints.open import open_checkpoint
from swquant.models.converted import as_built
from swquant.models.stock import empty_model


@pytest.mark.parametrize(("model_type", "made"), [("hrm_text", "gate_proj.weight"), ("olmo_hybrid", "conv1d.weight")])
def test_read_as_transformers_loads_it(model_type: str, made: str, tmp_path: Path) -> None:
    folder = every_architecture.save(every_architecture.build(model_type), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with open_checkpoint(folder) as checkpoint:
        converted = as_built(checkpoint)
        new = set(converted.tensors) - set(checkpoint.tensors)
        assert any(name.endswith(made) for name in new)
        for name in new:
            tensor = converted.read(name)
            assert (tensor.dtype, tensor.shape) == (converted.tensors[name].dtype, converted.tensors[name].shape)
            assert torch.equal(tensor, loaded[name])
        kept = set(converted.tensors) & set(checkpoint.tensors)
        assert kept
        assert all(torch.equal(converted.read(name), checkpoint.read(name)) for name in kept)
        weights = [sum(tensor.numel for tensor in part.tensors.values()) for part in (checkpoint, converted)]
        assert weights[0] == weights[1]  # nothing is lost, nothing is there twice
        assert f"{len(new)} tensors are stored as the model holds them" in converted.notes[-1]
        assert as_built(converted) is converted


def test_a_checkpoint_that_is_loaded_as_it_is_stored_stays_what_it_is(bf16_llama: Planted) -> None:
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        assert as_built(checkpoint) is checkpoint


def test_experts_stay_as_they_are_stored(tmp_path: Path) -> None:
    """Those transformers merges packed."""
    folder = every_architecture.save(every_architecture.build("mixtral"), tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        assert "block_sparse_moe.experts.0.w1" in " ".join(checkpoint.tensors)
        assert as_built(checkpoint, empty_model(checkpoint)) is checkpoint
