"""`swquant.load(…, trainable=True)`: the packed model with its blocks as parameters, for a loop of one's own."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT, TOKENS, save_model, tiny_model

import swquant
from exporters.errors import SwquantError
from swquant.training.patched_linear import PackedWeight, PatchedLinear


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainable")
    save_model(tiny_model("llama", num_hidden_layers=2), folder / "m", torch.bfloat16)
    swquant.compress(folder / "m", folder / "c", prompt=PROMPT, bits=3, block="32", outliers=0.002, dense=("v_proj",))
    swquant.tune(
        folder / "c",
        folder / "out",
        against=folder / "m",
        block=16,
        budget="1bits",
        steps=3,
        texts=4,
        window=32,
        lr="1e-2",
    )
    return folder / "out"


def test_it_is_the_model_that_loads(tuned: Path) -> None:
    model = swquant.load(tuned, trainable=True)
    parameters = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert parameters
    assert all(name.endswith(".values") for name in parameters)
    layers = [module for module in model.modules() if isinstance(module, PatchedLinear)]
    assert any(isinstance(layer.frozen, PackedWeight) for layer in layers)
    logits = model(TOKENS).logits
    assert torch.allclose(logits, swquant.load(tuned, dtype=torch.float32)(TOKENS).logits, atol=0.02)
    assert not torch.allclose(logits, swquant.load(tuned, dtype=torch.float32, restore=False)(TOKENS).logits, atol=0.02)


def test_a_loop_of_ones_own_trains_it(tuned: Path, tmp_path: Path) -> None:
    """transformers' Trainer, as its users write it."""
    from transformers import Trainer, TrainingArguments

    model = swquant.load(tuned, trainable=True)
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    before = float(model(TOKENS, labels=TOKENS).loss)
    Trainer(model, arguments, train_dataset=rows).train()
    assert float(model.eval()(TOKENS, labels=TOKENS).loss) < 0.8 * before


def test_what_has_no_blocks_is_refused(compressed: Path) -> None:
    with pytest.raises(SwquantError, match="has no blocks to train; swquant tune makes them"):
        swquant.load(compressed, trainable=True)
