"""What all methods share: the checkpoint and the original on a device, the texts, and what a model is measured with.

    recovery                 the original writes text, or --text is given; KL from it, on that text and on the test text
    python                   the standard library's source, tested on another file; cross entropy
    dates, numbers, units    formats, tested by exact match of the response; cross entropy

Of what is learned from an eighth is held out, on which rates are chosen; the test text is another. All tasks begin with
the same checkpoint. What it forgets is its loss on the test text (WikiText-2), before and after.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tasks import FORMATS, lines_of, measured, spaced, texts_of
from torch import Tensor
from transformers import PreTrainedModel

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import begins_with
from swquant.detect.texts import write_text
from swquant.evaluate.pipeline import Score, make_windows, score_window, window_logits
from swquant.output.destination import write_whole
from swquant.progress import silent
from swquant.training.data import Corpus, conversations, text_windows, token_windows
from swquant.training.model import trainable_model
from swquant.tune.options import TuneOptions
from swquant.tune.plan import TunePlan, make_plan
from swquant.tune.session import Session
from tuning.results import Case

__all__ = ["TASKS", "Material", "World"]

TASKS = ("recovery", "python", *FORMATS)
_LINES = 4  # a line of a format is about as much shorter than a window


@dataclass(frozen=True)
class Material:
    """Of one task. test: windows or lines that no step sees; None for recovery, which is tested on the common text.
    larger: so many sequences stand for one window in a batch."""

    corpus: Corpus
    held: Corpus
    test: Corpus | None = None
    larger: int = 1


class World:
    """Models are made once and copied: decoding a checkpoint takes longer than ten steps on a GPU."""

    def __init__(self, checkpoint: Checkpoint, original: Checkpoint, args: Namespace, device: torch.device) -> None:
        self.checkpoint, self.original, self.args, self.device = checkpoint, original, args, device
        self.windows = make_windows(checkpoint, args.test.read_text(), args.test_window, args.windows)
        self._plans: dict[tuple[str, str], TunePlan] = {}
        self._materials: dict[str, Material] = {}
        self.selected: dict[Any, dict[str, Tensor]] = {}  # scores of blocks, see `methods`

    @cached_property
    def base(self) -> PreTrainedModel:
        return trainable_model(self.checkpoint, self.device)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return trainable_model(self.original, self.device)

    def fresh(self) -> PreTrainedModel:
        """The checkpoint's model, to be changed."""
        return copy.deepcopy(self.base)

    def plan(self, case: Case) -> TunePlan:
        """Candidates, how many blocks the budget pays, and the options of all methods."""
        key = (case.budget, case.pool)
        if key not in self._plans:
            names = ("block", "steps", "texts", "window", "batch", "warmup", "precision")
            own = {name: getattr(self.args, name) for name in names}
            options = TuneOptions(budget=case.budget, from_=case.pool, **own)
            self._plans[key] = make_plan(self.checkpoint, options, against=self.original)
        return self._plans[key]

    def material(self, task: str) -> Material:
        if task not in self._materials:
            self._materials[task] = self._made(task)
        return self._materials[task]

    def _made(self, task: str) -> Material:
        window, count = self.args.window, self.args.texts
        if task in FORMATS:
            learned, test = (
                self._lines(task, size, seed) for size, seed in ((count * _LINES, 1), (self.args.lines, 3))
            )
            return Material(*learned.split(), test, _LINES)
        if task == "python":
            learned, test = (text_windows(self.checkpoint, text, window, task) for text in texts_of(task))
            return Material(*spaced(learned, count).split(), spaced(test, max(count // 8, 2)))
        if self.args.text is not None:
            given = text_windows(self.original, self.args.text.read_text(), window, self.args.text.name)
            return Material(*given.split())
        return Material(*token_windows(self._own_text(count, window), "own text").split())

    def _lines(self, task: str, count: int, seed: int) -> Corpus:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{task}.jsonl"
            path.write_text(lines_of(task, count, seed))
            return conversations(self.checkpoint, path, self.args.window)

    def _own_text(self, texts: int, length: int) -> Tensor:
        """int64 [texts, length] that the original writes, or wrote into --own-text."""
        path: Path | None = self.args.own_text
        if path is not None and path.exists():
            known = safetensors.torch.load_file(path)["text"]
            if known.shape[0] < texts or known.shape[1] != length:
                raise SystemExit(f"{path}: holds {list(known.shape)} tokens, not {[texts, length]}; take another file")
            return known[:texts]
        written = write_text(self.teacher, begins_with(self.original), 0, silent, texts=texts, length=length)
        if path is not None:
            write_whole(path, safetensors.torch.save({"text": written.contiguous()}))
        return written

    def session(self, model: Any, case: Case, seed: int) -> Session:
        material = self.material(case.task)
        options = self.plan(case).options
        options = replace(options, seed=seed, batch=options.batch * material.larger)
        teacher = self.teacher if case.task == "recovery" else None
        return Session(model, teacher, material.corpus, material.held, options)

    def measured(self, model: PreTrainedModel, case: Case) -> dict[str, float]:
        """held_out: the loss rates are chosen by; wiki: loss on the test text; and what the task is scored with: kl on
        the test text, nll on the task's own, exact match. Nats per token, and a share."""
        found = {"held_out": self.session(model, case, 0).held_out()}
        scores = [self._scored(model, ids, case.task == "recovery") for ids in self.windows.ids]
        tokens = sum(score.tokens for score in scores)
        found["wiki"] = sum(score.nll for score in scores) / tokens
        if case.task == "recovery":
            return {**found, "kl": sum(score.kl for score in scores) / tokens}
        material = self.material(case.task)
        assert material.test is not None
        test = measured(model, material.test, 4 * material.larger)
        return {**found, "nll": test["loss"], "exact": test["exact"]}

    def _scored(self, model: PreTrainedModel, ids: Tensor, against: bool) -> Score:
        bos = self.windows.bos
        with torch.no_grad():
            logits, targets = window_logits(model, ids, bos)
            return score_window(logits, targets, window_logits(self.teacher, ids, bos)[0] if against else None)
