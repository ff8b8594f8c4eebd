"""Tiny checkpoints to be exported to ONNX, and what an export must answer like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.loading import build_model
from swquant.models.onnx_model import OnnxModel

_PLAIN_MLP = ("opt",)

SETTINGS: dict = {"prompt": PROMPT, "block": "32", "outliers": 0.01}


def compressed_model(architecture: str, folder: Path, **options: object) -> Path:
    """A random model of two layers, as tracing takes seconds for each, with one weight in a hundred in the sidecar."""
    # genai's builder takes every module that is as wide as the vocabulary for the output head, hence 96.
    sizes = {"num_hidden_layers": 2, **({} if architecture in _PLAIN_MLP else {"intermediate_size": 96})}
    save_model(tiny_model(architecture, **sizes), folder / "model")
    return swquant.compress(folder / "model", folder / "out", **{**SETTINGS, **options}).path


def torch_model(checkpoint: Path) -> torch.nn.Module:
    """The checkpoint with every weight decoded in float32, as a runtime does."""
    with CompressedCheckpoint(checkpoint, unrounded=True) as opened:
        return build_model(opened, torch.float32)


def check_parity(checkpoint: Path, folder: Path, sequences: int = 2) -> None:
    """Prompts, an empty past and one of some tokens, and twelve greedy tokens through the cache.

    sequences: the builder's attention takes one, where several tokens meet a past.
    """
    reference = torch_model(checkpoint)
    model = OnnxModel.open(folder / "model.onnx", reference.config)
    ids = torch.randint(2, 128, (sequences, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids).logits.numpy()
    tolerance = 1e-4 * np.ptp(expected)
    whole, _ = model.step(ids.numpy(), model.empty_past(sequences))
    assert np.abs(whole - expected).max() < tolerance
    first, past = model.step(ids[:, :4].numpy(), model.empty_past(sequences))
    second, past = model.step(ids[:, 4:8].numpy(), past)
    third, _ = model.step(ids[:, 8:].numpy(), past)
    assert np.abs(np.concatenate([first, second, third], axis=1) - expected).max() < tolerance
    with torch.no_grad():
        greedy = reference.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert model.generate(ids[:1], max_new_tokens=12).tolist() == greedy.tolist()
