"""A small llama trained from scratch: an original whose weights never lay on any grid.

The other two originals of `quality.py` come from files of about 4 bits. `grid.py` mixes their blocks, but every single
weight still is one of the few values that its old block could hold. What no file of 4 bits has ever seen can only be
made: here is the recipe, and the weights are kept nowhere.

    model      llama of 8 layers, hidden size 384, 10.2 million weights in the linear layers; float32, head tied to
               the embedding
    tokenizer  byte-level BPE with 1,024 entries, learned from the same text; a BOS token in front
    text       WikiText-2's validation excerpt (`data/`) five times over, the language reference that Python's `help`
               shows, and the sources of some modules of the standard library. Neither text that `quality.py` measures
               on is among them: not WikiText-2's test set, not `textwrap`
    training   AdamW, one row of 256 tokens per step, the learning rate up for 60 steps and down a cosine; most of
               the text is read once

The same seed, versions and number of threads give the same weights; another Python has other help texts, and gives
another model of the same kind. Twelve minutes on one busy core are next to nothing: the model writes phrases, no sense.
Steps are small and many because so little text is best used so. Perplexity is 108 on WikiText-2's test excerpt and 136
on `textwrap`, where the best model that knows only how frequent each token of these texts is has 246 and 238 (both are
printed). A model that has learned so little is also easy to round: minimum and maximum at 4 bits cost it a KL of
0.0004, a thousandth of what they cost the other two. Compare its rows by KL; its perplexity hardly moves.

    python benchmarks/trained.py FOLDER [--steps N]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swquant.checkpoints.open import open_checkpoint
from swquant.evaluate.pipeline import fit_window, make_windows, perplexity_of, score_window, window_logits
from swquant.models.loading import build_model

__all__ = ["STEPS", "train"]

DATA = Path(__file__).parent.parent / "data"
# The standard library's; those that this Python does not have are left out.
MODULES = ("argparse", "calendar", "configparser", "difflib", "pprint", "shlex", "statistics", "string")
STEPS, WARMUP, CONTEXT = 1600, 60, 256  # one row of text per step
VOCABULARY, START, END = 1024, "<s>", "</s>"
RATE, LOWEST, SEED = 1e-3, 0.05, 0


def training_text() -> list[str]:
    """WikiText, help, sources: about 1.3 million characters."""
    from pydoc_data.topics import topics

    wiki = (DATA / "wikitext2-valid-excerpt.txt").read_text("utf-8")
    places = [spec.origin for name in MODULES if (spec := importlib.util.find_spec(name)) and spec.origin]
    sources = [Path(place).read_text("utf-8") for place in places if place.endswith(".py")]
    return [*[wiki] * 5, "\n\n".join(topics[key] for key in sorted(topics)), *sources]


def learn_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, model_max_length=CONTEXT)


def rows_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """int64 [rows, CONTEXT], a BOS token in front of each."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    size = CONTEXT - 1
    rows = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)


def shuffled(rows: Tensor) -> Iterator[Tensor]:
    """int64 [1, CONTEXT] without end: every row once, in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(1)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).float()


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: a straight line up, then half a cosine down to LOWEST."""
    warmup = min(WARMUP, max(1, steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def fit(model: LlamaForCausalLM, rows: Tensor, steps: int) -> None:
    """Train in place; prints the mean loss since the last line."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    supply = shuffled(rows)
    start, losses = time.perf_counter(), []
    model.train()
    for step in range(1, steps + 1):
        ids = next(supply)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            passed = time.perf_counter() - start
            print(f"step {step:4} of {steps}: loss {sum(losses) / len(losses):.3f}, {passed:.0f} s", flush=True)
            losses.clear()


def train(folder: Path, steps: int = STEPS) -> None:
    """Train and save. The folder appears when all is done, or not at all."""
    torch.manual_seed(SEED)
    texts = training_text()
    tokenizer = learn_tokenizer(texts)
    rows = rows_of(tokenizer, texts)
    model = new_model(tokenizer)
    linear = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name and weight.dim() == 2)
    seen = steps * CONTEXT / rows.numel()
    print(f"{linear / 1e6:.1f} million linear weights, {rows.numel():,} tokens read {seen:.2f} times", flush=True)
    fit(model, rows, steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@torch.no_grad()
def judge(folder: Path, text: str) -> tuple[float, float]:
    """Perplexity of the saved model on a text, and of the text's own token frequencies: no unigram model has less."""
    with open_checkpoint(folder) as checkpoint:
        model = build_model(checkpoint, torch.float32)
        windows = make_windows(checkpoint, text, fit_window(checkpoint, CONTEXT))
        scores = [score_window(*window_logits(model, ids, windows.bos)) for ids in windows.ids]
    counts = Counter(int(token) for ids in windows.ids for token in ids)
    total = counts.total()
    entropy = -sum(count * math.log(count / total) for count in counts.values()) / total
    tokens = sum(score.tokens for score in scores)
    return perplexity_of(sum(score.nll for score in scores) / tokens), math.exp(entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small llama from scratch, for benchmarks of quality.")
    parser.add_argument("folder", type=Path, help="where to write it; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder}: exists; remove it first, or name another folder")
    if options.steps < 1:
        parser.error(f"{options.steps} steps train nothing; give 1 or more")
    train(options.folder, options.steps)
    for name in ("wikitext2-excerpt.txt", "python-source.txt"):
        reached, unigram = judge(options.folder, (DATA / name).read_text("utf-8"))
        print(f"{name}: perplexity {reached:.1f}; the best unigram model's is {unigram:.1f}")


if __name__ == "__main__":
    main()
