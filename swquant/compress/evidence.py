"""What is known of a tensor's inputs when it is rounded: from the one prompt, and from the model's own text if any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from calibrationless import Evidence
from swquant.compress.plan import TensorPlan
from swquant.compress.prepared import Prepared
from swquant.detect.found import Found
from swquant.detect.own_text import SelfText, self_text
from swquant.progress import Progress

__all__ = ["evidence_for", "text_of"]


@contextmanager
def text_of(prepared: Prepared, progress: Progress) -> Iterator[SelfText | None]:
    """The model with text of its own, where the refinement needs it; None otherwise."""
    options = prepared.plan.options
    if options.refinement != "self":
        yield None
        return
    names = [tensor.name for tensor in prepared.plan.quantized if not tensor.transposed and not tensor.table]
    with self_text(
        prepared.checkpoint,
        prepared.found,
        names,
        texts=options.texts,
        text_from=options.text_from,
        low_memory=prepared.low_memory,
        seed=options.seed,
        progress=progress,
        device=prepared.device,
    ) as text:
        yield text


def evidence_for(tensor: TensorPlan, found: Found, refinement: str, text: SelfText | None) -> Evidence:
    """Of a tensor's inputs, scaled as its columns will be."""
    if tensor.recipe is None:
        return Evidence()
    if tensor.table:
        seen = found.energy(found.architecture.head)
        return Evidence(importance=seen if refinement != "none" else None, energy=seen)
    if tensor.transposed:  # all weights of a block read one input: they matter alike
        return Evidence(importance=torch.ones(tensor.shape[1]) if refinement != "none" else None)
    exponents = tensor.fold.exponents if tensor.fold is not None else None
    own = text.statistics(tensor.name, exponents) if text is not None else None
    if own is not None:
        factor, energy = own
        return Evidence(importance=energy, energy=energy, factor=factor)
    seen = found.energy(tensor.name)
    if seen is not None and exponents is not None:
        seen = torch.ldexp(seen, -2 * exponents.to(torch.int32))
    return Evidence(importance=seen if refinement != "none" else None, energy=seen)
