"""Statistics of the own text, layer by layer, against plain hooks on the whole model: the same bits in every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import every_architecture
from support.tiny_models import ARCHITECTURES, PROMPT, save_model, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import damping_for, inverse_factor
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.found import Found
from swquant.detect.own_text import SelfText
from swquant.detect.pipeline import find_super_weights, probed_model, watchable
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.models.architecture import LinearKind
from swquant.models.converted import as_built

TOKENS = torch.randint(12, 120, (6, 24), generator=torch.Generator().manual_seed(3))  # two batches, one of them short


def linear_names(found: Found) -> list[str]:
    seen = found.probe.linears
    weights = found.architecture.weights.values()
    return [weight.name for weight in weights if weight.kind is LinearKind.LINEAR and weight.watch in seen]


def gram_matrices(model: PreTrainedModel, modules: dict[str, str]) -> dict[str, Tensor]:
    """name -> X^T X of all inputs of its module, by hooks while the whole model runs, a batch after the other."""
    grams: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if name in grams:
            grams[name].addmm_(rows.T, rows)
        else:
            grams[name] = rows.T @ rows

    with ExitStack() as stack, torch.no_grad(), watchable(model):
        for name, module in modules.items():
            hook = lambda _, args, name=name: keep(name, args[0])  # noqa: E731
            stack.callback(model.get_submodule(module).register_forward_pre_hook(hook).remove)
        for batch in TOKENS.split(4):
            model.base_model(input_ids=batch, use_cache=False)
    return grams


@contextmanager
def prepared(folder: Path, prompt: str, low_memory: bool) -> Iterator[tuple[Checkpoint, PreTrainedModel, Found]]:
    with open_checkpoint(folder) as opened:
        checkpoint = as_built(opened)
        found = find_super_weights(checkpoint, prompt)
        with probed_model(checkpoint, low_memory) as model:
            yield checkpoint, model, found


def check_against_hooks(model: PreTrainedModel, found: Found, names: list[str]) -> int:
    """Returns how many weights were compared."""
    grams = gram_matrices(model, {name: found.architecture.weights[name].module for name in names})
    text = SelfText(model, found, TOKENS, names)
    for name in names:
        statistics = text.statistics(name, None)
        if name not in grams:
            assert statistics is None
            continue
        assert statistics is not None
        (order, upper), importance = statistics
        with watchable(model):  # on one thread
            expected_order, expected = inverse_factor(grams[name], damping_for(TOKENS.numel()))
        assert torch.equal(order, expected_order)
        assert torch.equal(upper, expected)
        assert torch.equal(importance, grams[name].diagonal())
    text.close()
    return len(grams)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("gpt2", "falcon")])
@pytest.mark.parametrize("low_memory", [False, True], ids=["in memory", "low memory"])
def test_statistics_are_those_of_plain_hooks(architecture: str, low_memory: bool, tmp_path: Path) -> None:
    layers = 8 if architecture == "gemma3" else 3  # of Gemma, windows and whole attention
    folder = save_model(tiny_model(architecture, num_hidden_layers=layers), tmp_path / "model")
    with prepared(folder, PROMPT, low_memory) as (_, model, found):
        names = linear_names(found)
        assert check_against_hooks(model, found, names) == len(names) >= 4 * layers - 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", every_architecture.CAUSAL)
def test_in_every_architecture(model_type: str, tmp_path: Path) -> None:
    try:
        built = every_architecture.build(model_type, torch.float32)
        folder = every_architecture.save(built, tmp_path / "model")
        every_architecture.logits_of(built)
        context = prepared(folder, DEFAULT_PROMPT, low_memory=False)
        _, model, found = context.__enter__()
    except (SwquantError, ImportError, ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        pytest.skip(f"cannot be run on text: {error}")
    try:
        with torch.no_grad():
            model.base_model(input_ids=TOKENS[:1], use_cache=False)
    except Exception as error:
        pytest.skip(f"its base model does not run on text alone: {error}")
    check_against_hooks(model, found, linear_names(found))
    context.__exit__(None, None, None)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama", num_hidden_layers=4), tmp_path / "model")


def test_one_pass_runs_every_layer_once_for_each_batch(llama: Path) -> None:
    with prepared(llama, PROMPT, low_memory=True) as (checkpoint, model, found):
        calls: list[int] = []
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        reads: Counter[str] = Counter()
        read = checkpoint.read
        checkpoint.read = lambda name: (reads.update([name]), read(name))[1]  # type: ignore[method-assign]
        text = SelfText(model, found, TOKENS, names := linear_names(found))
        for name in names:
            before = len(calls)
            text.statistics(name, None)
            assert calls[before:] == sorted(calls[before:])
            # Nothing of a later layer is touched before its weights are asked for.
            assert max(calls) == found.architecture.weights[name].layer
        assert calls == [layer for layer in range(4) for _ in range(2)]
        assert set(reads.values()) == {2}
        text.close()


def test_weights_out_of_turn_have_the_same_statistics(llama: Path) -> None:
    with prepared(llama, PROMPT, low_memory=False) as (_, model, found):
        names = linear_names(found)
        assert check_against_hooks(model, found, names[::-1]) == len(names)
        assert check_against_hooks(model, found, names[len(names) // 2 :] + names[: len(names) // 2]) == len(names)


def test_channels_are_scaled_in_the_matrix(llama: Path) -> None:
    with prepared(llama, PROMPT, low_memory=False) as (_, model, found):
        name = next(name for name in linear_names(found) if "q_proj" in name)
        text = SelfText(model, found, TOKENS, [name])
        exponents = torch.arange(64) % 3 - 1
        plain, scaled = text.statistics(name, None), text.statistics(name, exponents)
        assert plain is not None
        assert scaled is not None
        torch.testing.assert_close(scaled[1], plain[1] * torch.exp2(-2.0 * exponents), rtol=0, atol=0)
        again = text.statistics(name, None)
        assert again is not None
        assert torch.equal(again[0][1], plain[0][1])
        text.close()


class Looped(nn.ModuleList):
    """The layers of a model, of which it runs one a second time behind the next: a small recurrent depth."""

    def __getitem__(self, index: Any) -> Any:
        return [self._modules[str(layer)] for layer in (0, 1, 2, 1, 3)] if isinstance(index, slice) else None


def test_a_layer_that_runs_twice_is_complete_before_it_is_used(llama: Path) -> None:
    with prepared(llama, PROMPT, low_memory=False) as (checkpoint, model, _):
        model.model.layers.__class__ = Looped
        found = find_super_weights(checkpoint, PROMPT, model=model)
        products = {name: found.probe.linears[name].products for name in linear_names(found)}
        assert {name for name, count in products.items() if count == 2} == {n for n in products if ".layers.1." in n}
        assert check_against_hooks(model, found, linear_names(found)) == len(products)
