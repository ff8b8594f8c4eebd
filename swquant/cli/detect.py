"""`swquant detect`: super weights and super activations of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    LowMemoryOption,
    MemoryOption,
    ModelArgument,
    TrustOption,
    err,
    make_progress,
    out,
    print_json,
)
from swquant.detect.prompt import DEFAULT_PROMPT, PROMPT_HELP
from swquant.terminal.text import marked_sentence

__all__ = ["detect"]


def detect(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help=PROMPT_HELP)] = DEFAULT_PROMPT,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the largest inputs and outputs by layer to FILE (.png, .svg, .pdf).",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    low_memory: LowMemoryOption = False,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Find super weights and super activations with one prompt, and show the evidence."""
    from swquant.api import detect as find
    from swquant.detect.plot import check_plot_file, plot_detection
    from swquant.detect.record import detection_record
    from swquant.terminal.detection import show_detection

    if plot is not None:
        check_plot_file(plot)
    found = find(
        model,
        prompt,
        low_memory=low_memory,
        memory=memory,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    record = detection_record(found)
    if as_json:
        print_json({"model": found.model, **record})
    else:
        show_detection(out, found.model, record)
    if plot is not None:
        plot_detection(record, plot, title=found.model)
        err.print(f"Drew {marked_sentence(str(plot))}", soft_wrap=True)
