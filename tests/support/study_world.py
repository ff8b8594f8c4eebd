"""A tiny model for the study's tests: what each experiment should find is planted, and the control lacks it.

Every window begins with the BOS that the planted neuron fires on; the text was sampled from the model itself, so that
it is the best model of it and pruning shows; and the tokens that gain most without the super weight are stopwords.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCABULARY, plant, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from swquant.study.pipeline import Study

BOS = 5  # the first token of tiny_models.PROMPT, which `plant` makes the neuron fire on
WINDOW, WINDOWS = 24, 6
STOPWORDS = ("the", "of", "and", "to")
PROMPT = "w009 w017 w033 w064 w002"
OPTIONS: dict[str, Any] = {"prompt": PROMPT, "window": WINDOW, "limit": WINDOWS}


@dataclass(frozen=True)
class World:
    """A model, the text that it wrote, and the name, row and column of what was planted (if anything was)."""

    folder: Path
    text: Path
    name: str
    row: int = 37
    col: int = 101


def _tokenizer(words: dict[int, str]) -> PreTrainedTokenizerFast:
    vocabulary = {words.get(index, f"w{index:03d}"): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = f"w{BOS:03d}"
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w000", bos_token=bos, eos_token="w001")


@torch.no_grad()
def _write(model: PreTrainedModel) -> torch.Tensor:
    """[WINDOWS, 1 + WINDOW]: texts that the model wrote after BOS. Special tokens would be cut out of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((WINDOWS, 1), BOS)
    for _ in range(WINDOW):
        logits = model(ids).logits[:, -1]
        logits[:, [0, 1, BOS]] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)], dim=1)
    return ids


@torch.no_grad()
def _gaining(model: PreTrainedModel, name: str, ids: torch.Tensor) -> list[int]:
    """The tokens that the model without its super weight likes most more."""
    weight = model.get_parameter(name)
    before = model(ids).logits.softmax(dim=-1).mean(dim=(0, 1))
    value = weight[37, 101].item()
    weight[37, 101] = 0.0
    after = model(ids).logits.softmax(dim=-1).mean(dim=(0, 1))
    weight[37, 101] = value
    gain = after - before
    gain[[0, 1, BOS, 9, 17, 33, 64, 2]] = -1.0
    return gain.topk(len(STOPWORDS)).indices.tolist()


def make_world(folder: Path, *, planted: bool) -> World:
    """Save model, tokenizer and text. Without a super weight the same model is the control."""
    model = tiny_model("llama", bos_token_id=BOS)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.5)  # so that predictions are worth losing
    control = None if planted else model
    name = plant(model) if planted else ""
    ids = _write(model)
    words = dict(zip(_gaining(model, name, ids), STOPWORDS, strict=True)) if control is None else {}
    tokenizer = _tokenizer(words)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text(" ".join(tokenizer.convert_ids_to_tokens(ids[:, 1:].flatten().tolist())))
    return World(folder / "model", text, name)


def without_super_weight(planted: World, folder: Path) -> Path:
    shutil.copytree(planted.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[planted.name][planted.row, planted.col] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def section(study: Study, name: str) -> dict[str, Any]:
    return next(item for item in study.record["sections"] if item["name"] == name)


def rows(study: Study, name: str, table: str) -> list[dict[str, Any]]:
    return section(study, name)["tables"][table]
