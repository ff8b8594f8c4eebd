"""Perplexity, KL divergence, agreement and acceptance equal a plain loop; unusable texts and models are one message."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import PROMPT, VOCABULARY, Planted, save_model, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.evaluate.pipeline import make_windows

# Not t0…, t1… and t3…: the special tokens t0, t1 and t3 are cut out of longer words, too.
WORDS = torch.tensor([index for index in range(VOCABULARY) if str(index)[0] not in "013"])
IDS = WORDS[torch.randint(0, len(WORDS), (83,), generator=torch.Generator().manual_seed(0))].tolist()
TEXT = " ".join(f"t{index}" for index in IDS)


def save_bos_tokenizer(folder: Path, words: int = VOCABULARY, shift: int = 0) -> None:
    """A tokenizer that begins every text with t3, its BOS."""
    vocabulary = {f"t{index}": (index + shift) % words for index in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("t3 $A", special_tokens=[("t3", (3 + shift) % words)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", bos_token="t3", eos_token="t1").save_pretrained(
        folder
    )


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[positions, vocabulary] in float64."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def plainly(model: Path, original: Path | None, window: int, bos: int | None) -> dict[str, float]:
    """Perplexity, KL, agreement and acceptance, one position at a time."""
    first = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    second = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32) if original else first
    nll = kl = accepted = 0.0
    agreeing = count = windows = 0
    for start in range(0, len(IDS), window):
        ids = IDS[start : start + window]
        if bos is not None:
            ids = [bos, *ids]
        ours, theirs = log_probabilities(first, ids), log_probabilities(second, ids)
        for position in range(len(ids) - 1):
            nll -= float(ours[position, ids[position + 1]])
            p, q = theirs[position], ours[position]
            kl += float((p.exp() * (p - q)).sum())
            accepted += float(torch.minimum(p.exp(), q.exp()).sum())
            agreeing += int(p.argmax()) == int(q.argmax())
            count += 1
        windows += len(ids) > 1
    return {
        "perplexity": math.exp(nll / count), "tokens": count, "windows": windows, "kl": kl / count, "top1": agreeing / count,
        "accepted": accepted / count,
    }  # fmt: skip


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("window", [6, 41, 2048])
def test_it_equals_a_plain_loop(
    bf16_llama: Planted, control_llama: Path, tmp_path: Path, window: int, bos: int | None
) -> None:
    model, original = tmp_path / "model", tmp_path / "original"
    shutil.copytree(bf16_llama.folder, model)
    shutil.copytree(control_llama, original)
    if bos is not None:
        save_bos_tokenizer(model)
        save_bos_tokenizer(original)
    expected = plainly(model, original, min(window, 127), bos)  # the model takes 128 positions
    got = swquant.evaluate(model, TEXT, original, window=window)
    assert (got.tokens, got.windows) == (expected["tokens"], expected["windows"])
    assert got.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert got.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert got.top1 == expected["top1"]
    assert got.accepted == pytest.approx(expected["accepted"], abs=1e-6)
    assert got.original_perplexity == pytest.approx(
        plainly(original, None, min(window, 127), bos)["perplexity"], rel=1e-4
    )


def test_a_window_never_exceeds_the_models_context(source: Path) -> None:
    config = source / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 32'))
    assert swquant.evaluate(source, TEXT, window=2048) == swquant.evaluate(source, TEXT, window=31)


def test_limit_takes_the_first_windows(bf16_llama: Planted) -> None:
    first = " ".join(TEXT.split()[:20])
    assert swquant.evaluate(bf16_llama.folder, TEXT, window=10, limit=2) == swquant.evaluate(
        bf16_llama.folder, first, window=10
    )


def test_a_lone_last_token_is_no_window_without_bos(bf16_llama: Planted) -> None:
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        windows = make_windows(checkpoint, TEXT, 41)
    assert [len(ids) for ids in windows.ids] == [41, 41]
    assert windows.predicted == 80


def test_a_model_does_not_diverge_from_itself(compressed: Path) -> None:
    result = swquant.evaluate(compressed, TEXT, compressed, window=40)
    assert (result.kl, result.top1, result.accepted) == (0.0, 1.0, 1.0)
    assert result.perplexity == result.original_perplexity


def test_fewer_bits_are_worse(control_llama: Path, tmp_path: Path) -> None:
    kl = []
    for bits in (8, 4, 2):
        out = swquant.compress(control_llama, tmp_path / str(bits), prompt=PROMPT, bits=bits).path
        kl.append(swquant.evaluate(out, TEXT, control_llama).kl)
    assert 0 < 10 * kl[0] < kl[1]
    assert 3 * kl[1] < kl[2]


def test_without_its_super_weight_a_model_is_another(bf16_llama: Planted, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights[bf16_llama.name][bf16_llama.row, bf16_llama.col] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = swquant.evaluate(source, PROMPT, bf16_llama.folder)
    assert result.kl is not None
    assert result.kl > 0.1
    assert math.isfinite(result.perplexity)


def test_more_outliers_are_better_and_only_with_the_sidecar(control_llama: Path, tmp_path: Path) -> None:
    out = swquant.compress(control_llama, tmp_path / "out", prompt=PROMPT, bits=3, outliers=0.1).path
    with_it = swquant.evaluate(out, TEXT, control_llama).kl
    without = swquant.evaluate(out, TEXT, control_llama, restore=False).kl
    assert with_it is not None
    assert without is not None
    assert 1.1 * with_it < without


@pytest.mark.parametrize("text", ["", "t5", "   "])
def test_a_text_without_anything_to_predict_is_refused(bf16_llama: Planted, text: str) -> None:
    with pytest.raises(swquant.SwquantError, match=r"the text has [01] tokens, too few .*give a longer one"):
        swquant.evaluate(bf16_llama.folder, text)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_that_predicts_nothing_is_refused(bf16_llama: Planted, window: int) -> None:
    with pytest.raises(swquant.SwquantError, match=f"a window of {window} tokens predicts nothing; use 2048"):
        swquant.evaluate(bf16_llama.folder, TEXT, window=window)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused_by_its_name(bf16_llama: Planted, limit: int) -> None:
    with pytest.raises(swquant.SwquantError, match="limit"):
        swquant.evaluate(bf16_llama.folder, TEXT, limit=limit)


def test_models_that_read_the_text_differently_are_not_compared(bf16_llama: Planted, source: Path) -> None:
    save_bos_tokenizer(source, shift=1)
    with pytest.raises(swquant.SwquantError, match="tokenize the text differently; compare with the original"):
        swquant.evaluate(source, TEXT, bf16_llama.folder)


def test_a_tokenizer_that_drops_the_end_reads_the_text_differently(bf16_llama: Planted, source: Path) -> None:
    """The first window is the same; the second exists for one of the two only."""
    tokenizer = Tokenizer(models.BPE({f"t{index}": index for index in range(VOCABULARY)}, []))  # drops what it lacks
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["t5", "t9"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    for model, against in ((source, bf16_llama.folder), (bf16_llama.folder, source)):
        with pytest.raises(swquant.SwquantError, match="tokenize the text differently"):
            swquant.evaluate(model, "t5 t9 t5 t9 t33 t64", against, window=4)


def test_models_of_different_vocabularies_are_not_compared(bf16_llama: Planted, tmp_path: Path) -> None:
    other = save_model(tiny_model("llama", vocab_size=144), tmp_path / "other")
    with pytest.raises(swquant.SwquantError, match="different vocabularies; compare with the original"):
        swquant.evaluate(other, TEXT, bf16_llama.folder)


def poison(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_model_of_nan_is_refused(source: Path) -> None:
    poison(source, torch.nan)
    with pytest.raises(
        swquant.SwquantError, match=r"source: model\.layers\.2.* holds a NaN or infinite value.*fetch the model again"
    ):
        swquant.evaluate(source, TEXT)


def test_an_original_of_nan_is_refused_too(bf16_llama: Planted, source: Path) -> None:
    poison(source, torch.nan)
    with pytest.raises(
        swquant.SwquantError, match=r"source: model\.layers\.2.* holds a NaN or infinite value.*fetch the model again"
    ):
        swquant.evaluate(bf16_llama.folder, TEXT, source)


def test_generating_twice_gives_the_same_text(compressed: Path) -> None:
    first = swquant.generate(compressed, "t5 t9 t27", tokens=8)
    assert first.startswith("t5 t9 t27 ")
    assert 4 <= len(first.split()) <= 11
    assert swquant.generate(compressed, "t5 t9 t27", tokens=8) == first


@pytest.mark.parametrize(("prompt", "tokens"), [("", 5), ("t5", 0), ("t5", -1)])
def test_nothing_to_generate_is_refused(compressed: Path, prompt: str, tokens: int) -> None:
    with pytest.raises(swquant.SwquantError, match="prompt is empty|tokens"):
        swquant.generate(compressed, prompt, tokens=tokens)
