"""Perplexity of a model on a text and, against the original, KL divergence, top-1 agreement and acceptance.

The protocol, in full, because perplexities with different ones do not compare:

- The text is tokenized once, as it stands, without special tokens. `<unk>` in WikiText is left as the text that it is.
- It is cut into windows of `window` tokens that do not overlap; the last one may be shorter.
- If the tokenizer by itself begins a text with a BOS token, every window does too; then all tokens of a window are
  predicted, otherwise all but its first.
- Perplexity is exp of the mean negative log-likelihood over all predicted tokens of all windows.
- KL(original || model) and agreement of the most likely token are means over the same positions.
- So is the acceptance rate, sum min(p, q) of the original's probabilities p and the model's q, which is 1 - their total
  variation: the share of tokens drawn from the model that speculative decoding with it as the draft and the original as
  the target would accept, at temperature 1 (Leviathan et al. 2023, arXiv:2211.17192).
- Everything is computed in float32.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint, ModelFolder
from swquant.checkpoints.onnx import OnnxFolder
from swquant.checkpoints.tokenizer import context_of, encode
from swquant.models.devices import place_for
from swquant.models.loading import quiet, running_model
from swquant.models.onnx_model import OnnxModel
from swquant.models.routing import router_of
from swquant.progress import Progress, silent

__all__ = [
    "Evaluation",
    "Score",
    "Windows",
    "evaluate_model",
    "fit_window",
    "make_windows",
    "perplexity_of",
    "runnable_model",
    "score_window",
    "window_logits",
]

# Rows of logits whose log-softmax is held at a time: 128 rows of 262,144 words take 134 MB, up to three times.
_ROWS = 128


@dataclass(frozen=True)
class Evaluation:
    """Means over the predicted tokens. tokens, windows: how many.

    None without an original to compare with: kl (nats), top1 (agreement, 0 to 1), accepted (expected acceptance rate of
    speculative decoding, 0 to 1) and original_perplexity. tasks: of a model that chooses, task -> windows; else None.
    """

    perplexity: float
    tokens: int
    windows: int
    kl: float | None = None
    top1: float | None = None
    accepted: float | None = None
    original_perplexity: float | None = None
    tasks: dict[str, int] | None = None


@dataclass(frozen=True)
class Windows:
    """Token ids cut as described above. bos: the id that every window begins with, None if there is none."""

    ids: tuple[Tensor, ...]
    bos: int | None

    @property
    def predicted(self) -> int:
        return sum(len(ids) - (self.bos is None) for ids in self.ids)

    def same_as(self, other: Windows) -> bool:
        return self.bos == other.bos and [ids.tolist() for ids in self.ids] == [ids.tolist() for ids in other.ids]


def make_windows(checkpoint: ModelFolder, text: str, window: int, limit: int | None = None) -> Windows:
    """Cut a text. limit: at most so many windows. Raises SwquantError for a text too short to predict anything."""
    if window < 2:
        raise SwquantError(f"a window of {window} tokens predicts nothing; use 2048, or what the model takes")
    if limit is not None and limit < 1:
        raise SwquantError(f"a limit of {limit} windows leaves nothing to evaluate; give 1 or more, or none")
    with quiet():
        ids = encode(checkpoint, text, special=False)
        with_special = encode(checkpoint, "a")
    bos = checkpoint.tokenizer().bos_token_id
    if bos is None or not with_special or with_special[0] != bos:
        bos = None
    pieces = [torch.tensor(ids[start : start + window]) for start in range(0, len(ids), window)]
    pieces = [piece for piece in pieces[:limit] if len(piece) > (bos is None)]
    if not pieces:
        raise SwquantError(f"the text has {len(ids)} tokens, too few to predict any; give a longer one")
    return Windows(tuple(pieces), bos)


def fit_window(checkpoint: ModelFolder, window: int) -> int:
    """`window`, or as many tokens as the model takes with one more in front."""
    context = context_of(checkpoint.config)
    return window if context is None else min(window, context - 1)


def runnable_model(checkpoint: ModelFolder, device: torch.device = CPU) -> PreTrainedModel | OnnxModel:
    """The model in float32, on `device` if it fits there; an ONNX graph in what it was exported for, where ONNX Runtime
    runs it."""
    if isinstance(checkpoint, OnnxFolder):
        return OnnxModel.open(checkpoint.graph, checkpoint.config, checkpoint.end_tokens)
    assert isinstance(checkpoint, Checkpoint)
    return running_model(checkpoint, torch.float32, place_for(checkpoint, torch.float32, device)[0])


def said_of(checkpoint: ModelFolder, device: torch.device) -> str:
    """For a line of progress: where the model runs, "" on the CPU."""
    return place_for(checkpoint, torch.float32, device)[1] if isinstance(checkpoint, Checkpoint) else ""


def window_logits(model: PreTrainedModel | OnnxModel, ids: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """(logits [n, vocabulary], targets int64 [n]) of one window, on the model's device."""
    inputs = ids if bos is None else torch.cat([torch.tensor([bos]), ids])
    if isinstance(model, PreTrainedModel):
        inputs = inputs.to(model.device)
    logits = model(input_ids=inputs.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits, inputs[1:]


@dataclass(frozen=True)
class Score:
    """Sums over the predicted tokens of one window, which add up to an `Evaluation`.

    nll: negative log-likelihood. kl: KL(original || model). agree: how often both have the same most likely token.
    accepted: how many tokens speculative decoding is expected to accept.
    """

    tokens: int
    nll: float
    kl: float = 0.0
    agree: int = 0
    accepted: float = 0.0


def score_window(logits: Tensor, targets: Tensor, reference: Tensor | None = None, mass: Tensor | None = None) -> Score:
    """Score one window. logits, reference: [n, vocabulary] of the model and of the original; targets: int64 [n].

    Without a reference kl (nats), agree and accepted (tokens) are 0. mass: float64 [vocabulary], to which the predicted
    probabilities are added.
    """
    nll = kl = accepted = 0.0
    agree = 0
    for start in range(0, len(targets), _ROWS):
        piece = slice(start, start + _ROWS)
        ours = _log_softmax(logits[piece])
        nll -= float(ours.gather(1, targets[piece].unsqueeze(1)).sum(dtype=torch.float64))
        if mass is not None:
            mass += ours.exp().sum(dim=0, dtype=torch.float64)
        if reference is not None:
            theirs = _log_softmax(reference[piece])
            agree += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
            # One fresh piece, the rest in place: memory for each of the steps would cost more than the steps.
            divergence = torch.sub(theirs, ours).mul_(theirs.exp_())
            kl += float(divergence.sum(dim=-1).clamp_(min=0).sum(dtype=torch.float64))
            # p - min(p, q): unlike min(p, q), exactly nothing where both are equal.
            refused = torch.sub(theirs, ours.exp_(), out=ours).clamp_(min=0)
            accepted += float((1 - refused.sum(dim=-1)).clamp_(min=0).sum(dtype=torch.float64))
    return Score(len(targets), nll, kl, agree, accepted)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.float32).log_softmax(dim=-1)


def evaluate_model(
    checkpoint: ModelFolder,
    text: str,
    against: ModelFolder | None = None,
    *,
    window: int = 2048,
    limit: int | None = None,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a checkpoint on a text. Raises SwquantError where text, tokenizer or vocabulary do not fit.

    window: tokens per window, BOS aside; cut to what the model takes. limit: evaluate only so many windows."""
    window = fit_window(checkpoint, window)
    windows = make_windows(checkpoint, text, window, limit)
    if against is not None:
        other = make_windows(against, text, window, limit)
        if not windows.same_as(other):
            raise SwquantError(
                f"{checkpoint.name} and {against.name} tokenize the text differently; compare with the original"
            )
    scores: list[Score] = []
    originals: list[Score] = []
    with ExitStack() as stack, torch.no_grad():
        with progress.step(f"Loading {checkpoint.name}{said_of(checkpoint, device)}"):
            model = runnable_model(checkpoint, device)
        original: PreTrainedModel | OnnxModel | None = None
        if against is not None:
            with progress.step(f"Loading {against.name}{said_of(against, device)}"):
                original = runnable_model(against, device)
            if original.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
                raise SwquantError(
                    f"{checkpoint.name} and {against.name} have different vocabularies; compare with the original"
                )
        bar = stack.enter_context(progress.tokens("Evaluating", windows.predicted))
        for ids in windows.ids:
            logits, targets = window_logits(model, ids, windows.bos)
            reference = None
            if original is not None:
                reference = window_logits(original, ids, windows.bos)[0].to(logits.device)
                originals.append(score_window(reference, targets))
            scores.append(score_window(logits, targets, reference))
            bar.advance("", len(targets))
    count = windows.predicted
    for evaluated, of in ((checkpoint, scores), (against, originals)):
        if evaluated is not None and not math.isfinite(sum(score.nll for score in of)):
            raise SwquantError(
                f"{evaluated.name}: the model's output is NaN or infinite on this text; its weights are damaged"
            )
    return Evaluation(
        perplexity=perplexity_of(sum(score.nll for score in scores) / count),
        tokens=count,
        windows=len(windows.ids),
        kl=sum(score.kl for score in scores) / count if originals else None,
        top1=sum(score.agree for score in scores) / count if originals else None,
        accepted=sum(score.accepted for score in scores) / count if originals else None,
        original_perplexity=perplexity_of(sum(score.nll for score in originals) / count) if originals else None,
        tasks=None if (router := router_of(model)) is None else dict(router.counts),
    )


def perplexity_of(loss: float) -> float:
    """exp that gives infinity instead of an error: a destroyed model has a loss of thousands."""
    return math.exp(loss) if loss < 700 else math.inf
