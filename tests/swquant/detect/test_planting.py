"""Several super weights in one model, as the published directory lists them: in rows, columns, layers, at tokens.

The fast tests take a handful of families. The slow one takes all of `tiny_models.ARCHITECTURES` with three seeds, and
every other family of `every_architecture` that can be built and planted, and holds the rates of docs/detection.md.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import every_architecture
from support.planting import CannotPlantError, Spot, plant_spots
from support.tiny_models import ARCHITECTURES, PROMPT, save_model, tiny_model
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.pipeline import find_super_weights, prompt_tokens
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.models.architecture import Architecture, describe

Pick = Callable[[int], tuple[int, ...]]


def _in_two_layers(rows: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> list[Spot]:
    return [Spot(1, rows, first), Spot(2, rows, second)]


# name -> spots, of what picks rows and columns
KINDS: dict[str, Callable[[Pick, Pick], list[Spot]]] = {
    "one": lambda rows, cols: [Spot(1, rows(1), cols(1))],
    "columns": lambda rows, cols: [Spot(1, rows(1), cols(2))],  # Llama-13B
    "layers": lambda rows, cols: [Spot(1, rows(1), cols(1)), Spot(2, rows(1), cols(1))],
    "layers, one row": lambda rows, cols: _in_two_layers(rows(1), cols(1), cols(1)),  # OLMo-7B
    "rows": lambda rows, cols: [Spot(1, rows(3), cols(1))],  # Llama-3-8B
    "rows, weaker": lambda rows, cols: [Spot(1, rows(3), cols(1), neuron=3.0, value=20.0)],
    "rows, two tokens": lambda rows, cols: [Spot(1, rows(3), cols(1), tokens=(0, 3))],
    "rows, two layers": lambda rows, cols: _in_two_layers(rows(3), cols(1), cols(1)),  # Phi-3-mini
    "several of each": lambda rows, cols: [Spot(1, rows(2), cols(2)), Spot(2, rows(2), cols(2))],
}
# The least share of the planted super weights that must be found. Where norms lie on the residual stream (BERT), what a
# second layer adds to a row takes away from what the first put there.
RATES = dict.fromkeys(KINDS, 0.98) | {"one": 0.99, "layers": 0.99, "layers, one row": 0.95}


# Their linear attention is a loop in Python without the kernels of other packages: minutes for one model.
TOO_SLOW = ("bailing_hybrid", "kimi_linear")


def spots_of(kind: str, *seed: object) -> list[Spot]:
    generator = random.Random(f"{kind} {seed}")
    return KINDS[kind](
        lambda count: tuple(generator.sample(range(64), count)), lambda count: tuple(generator.sample(range(64), count))
    )


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Checkpoint, Architecture]]:
    """A checkpoint and what it is made of."""
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint, describe(checkpoint)


def found_in(checkpoint: Checkpoint, model: PreTrainedModel, prompt: str) -> Counter[tuple[int, int, int]]:
    weights = find_super_weights(checkpoint, prompt, model=model).detection.super_weights
    return Counter((weight.layer, weight.row, weight.col) for weight in weights)


@pytest.mark.parametrize("kind", ["layers, one row", "rows", "rows, two tokens", "rows, two layers", "several of each"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_several_super_weights_are_found_and_nothing_else(architecture: str, kind: str, tmp_path: Path) -> None:
    for seed in range(5):
        model = tiny_model(architecture, seed=seed)
        with opened(save_model(model, tmp_path / f"{architecture}-{seed}")) as (checkpoint, parts):
            tokens = torch.tensor([prompt_tokens(checkpoint, PROMPT)])
            try:
                planted = plant_spots(model, parts, spots_of(kind, architecture, seed), tokens)
            except CannotPlantError:
                continue
            assert found_in(checkpoint, model, PROMPT) == Counter(planted)
            return
    raise AssertionError("in none of five models does everything planted matter")


def families(work: Path) -> Iterator[tuple[str, PreTrainedModel, Path, str]]:
    """(name, model, its folder, prompt) of every model to plant into."""
    for seed in range(3):
        for name in ARCHITECTURES:
            model = tiny_model(name, seed=seed)
            yield f"{name} {seed}", model, save_model(model, work / f"{name}-{seed}"), PROMPT
    for name in every_architecture.CAUSAL:
        if name in TOO_SLOW:
            continue
        try:
            model = every_architecture.build(name, torch.float32)
            folder = every_architecture.save(model, work / f"every-{name}")
        except Exception:  # transformers raises nearly everything here; tests/support/sweep.py says what
            continue
        yield name, model, folder, DEFAULT_PROMPT


@pytest.mark.slow
def test_nearly_all_planted_super_weights_are_found_in_every_family(tmp_path: Path) -> None:
    planted, missed, others, models = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    details: list[str] = []
    for name, model, folder, prompt in families(tmp_path):
        original = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            with opened(folder) as (checkpoint, parts):
                tokens = torch.tensor([prompt_tokens(checkpoint, prompt)])
                others["control"] += found_in(checkpoint, model, prompt).total()
                models["control"] += 1
                for kind in KINDS:
                    model.load_state_dict(original)
                    try:
                        places = plant_spots(model, parts, spots_of(kind, name), tokens)
                    except (CannotPlantError, IndexError, AttributeError):
                        continue
                    found = found_in(checkpoint, model, prompt)
                    models[kind] += 1
                    planted[kind] += len(places)
                    missed[kind] += len(places - found.keys())
                    others[kind] += len(found.keys() - places)
                    if found != Counter(places):
                        details.append(f"{name}, {kind}: {sorted(places)} planted, {sorted(found)} found")
        except (SwquantError, AttributeError):  # an architecture that swquant refuses or does not know
            continue
    rates = {kind: 1 - missed[kind] / planted[kind] for kind in KINDS}
    table = {kind: [models[kind], planted[kind], round(rates[kind], 4), others[kind]] for kind in KINDS}
    report = json.dumps({"control": [models["control"], others["control"]], **table}, indent=1) + "\n".join(
        ["", *details]
    )
    print(report)  # what docs/detection.md says
    assert others["control"] == 0, report
    assert min(models.values()) >= 50, report
    assert all(rates[kind] >= least for kind, least in RATES.items()), report
    assert others.total() <= 0.01 * planted.total(), report
