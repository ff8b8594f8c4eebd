"""`swquant eval`: how well a model predicts a text, and how far it is from its original."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporters.errors import SwquantError
from swquant.cli.options import OUTPUT
from swquant.cli.shared import (
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RestoreOption,
    TaskOption,
    TrustOption,
    make_progress,
    out,
    print_json,
    text_of,
)

if TYPE_CHECKING:
    from swquant.evaluate.pipeline import Evaluation

__all__ = ["evaluate"]

MaxPerplexityOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Exit with 1 above this perplexity.", show_default=False, rich_help_panel=OUTPUT),
]
MaxKlOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Exit with 1 above this KL divergence (with --against).",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
CardOption = Annotated[bool, typer.Option("--card", help="Write it into README.md.", rich_help_panel=OUTPUT)]


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path,
        typer.Option("--text", metavar="FILE", help="The text to predict, a UTF-8 file.", show_default=False),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="ORIGINAL",
            help="Compare with this model: KL divergence, top-1 agreement, acceptance rate.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens per window.")] = 2048,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Evaluate only so many windows.", show_default=False)
    ] = None,
    restore: RestoreOption = True,
    task: TaskOption = None,
    base: BaseOption = None,
    max_perplexity: MaxPerplexityOption = None,
    max_kl: MaxKlOption = None,
    card: CardOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity on a text; with --against also KL divergence, agreement and acceptance rate beside the original."""
    from swquant.api import evaluate as evaluate_model

    if max_kl is not None and against is None:
        raise SwquantError("--max-kl needs an original to compare with; add --against ORIGINAL")
    if card:
        _check_card(Path(model))
    result = evaluate_model(
        model, text_of(text), against, window=window, limit=limit, restore=restore, task=task, base=base, device=device,
        trust_remote_code=trust_remote_code, progress=make_progress(as_json),
    )  # fmt: skip
    if card:
        from swquant.output.card import Measured, add_evaluation

        numbers = (result.tokens, result.windows, result.perplexity, result.original_perplexity, result.kl, result.top1)
        add_evaluation(Path(model), Measured(text.name, restore, *numbers))
    _show(result, model, against, as_json)
    _check("perplexity", result.perplexity, max_perplexity)
    _check("KL divergence", result.kl, max_kl)


def _check_card(folder: Path) -> None:
    """Raise SwquantError unless MODEL has a card to write into: known before the work, not after it."""
    from swquant.checkpoints.manifest import MANIFEST
    from swquant.output.card import read_card

    if not (folder / MANIFEST).is_file():
        raise SwquantError(
            f"{folder}: no folder made by swquant, which alone has a card to write into; leave out --card"
        )
    read_card(folder)


def _show(result: Evaluation, model: str, against: str | None, as_json: bool) -> None:
    if as_json:
        # A destroyed model has a perplexity beyond every float, for which JSON has no number.
        print_json(
            {
                key: None if isinstance(value, float) and not isfinite(value) else value
                for key, value in asdict(result).items()
            }
        )
        return
    from swquant.api import inspect
    from swquant.checkpoints.manifest import MANIFEST
    from swquant.terminal.evaluation import show_evaluation
    from swquant.terminal.formats import view_of

    show_evaluation(out, result)
    if against is not None and (Path(model) / MANIFEST).is_file():
        manifest = inspect(model)
        if (show_losses := view_of(manifest).losses) is not None:
            show_losses(out, manifest)


def _check(label: str, value: float | None, bound: float | None) -> None:
    if bound is not None and value is not None and not value <= bound:
        raise SwquantError(f"{label} {value:.4f} is above the limit {bound:g}")
