"""The commands of `swquant`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 something the user can mend (one message),
2 wrong usage, 130 interrupted. Heavy imports happen inside the commands, so help is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from exporters.errors import SwquantError
from swquant.cli.export import (
    AccuracyOption,
    FormatOption,
    GraphOption,
    HeadOption,
    PrecisionOption,
    export,
    show_exported,
)
from swquant.cli.shared import (
    CheckpointArgument,
    JsonOption,
    LowMemoryOption,
    ModelArgument,
    PromptOption,
    RestoreOption,
    SourceArgument,
    TrustOption,
    err,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.cli.study import study
from swquant.compress.options import CompressOptions
from swquant.declared import option_help
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.export.onnx.options import FORMATS, export_options

__all__ = ["app", "main"]

app = typer.Typer(
    name="swquant",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compress large language models without calibration data: super weights are found with one prompt and kept.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def detect(
    model: ModelArgument,
    prompt: PromptOption = DEFAULT_PROMPT,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Draw the largest inputs and outputs by layer to FILE (.png, .svg, .pdf).",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    low_memory: LowMemoryOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Find super weights and super activations with one prompt, and show the evidence."""
    from swquant.checkpoints.open import open_checkpoint
    from swquant.detect.pipeline import find_super_weights
    from swquant.detect.plot import check_plot_file, plot_detection
    from swquant.detect.record import detection_record
    from swquant.terminal.detection import show_detection

    if plot is not None:
        check_plot_file(plot)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        with make_progress(as_json).step(f"Probing {checkpoint.name} with one prompt"):
            found = find_super_weights(checkpoint, prompt, low_memory=low_memory)
        record = detection_record(found)
        if as_json:
            print_json({"model": checkpoint.name, **record})
        else:
            show_detection(out, checkpoint.name, record)
        if plot is not None:
            plot_detection(record, plot, title=checkpoint.name)
            err.print(f"Drew {escape(str(plot))}", soft_wrap=True)


@app.command()
def compress(
    model: SourceArgument,
    out_folder: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The folder to create; <name>-w4-b128 by default.", show_default=False),
    ] = None,
    form: FormatOption = "checkpoint",
    bits: Annotated[int, typer.Option(help=option_help("bits", CompressOptions))] = CompressOptions.bits,
    block: Annotated[
        str | None, typer.Option(help=option_help("block", CompressOptions), show_default=False)
    ] = CompressOptions.block,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help=option_help("symmetric", CompressOptions))
    ] = CompressOptions.symmetric,
    preset: Annotated[str, typer.Option(help=option_help("preset", CompressOptions))] = CompressOptions.preset,
    refine: Annotated[str | None, typer.Option(help=option_help("refine", CompressOptions), show_default=False)] = None,
    texts: Annotated[
        int, typer.Option(metavar="N", help=option_help("texts", CompressOptions))
    ] = CompressOptions.texts,
    clip: Annotated[str, typer.Option(help=option_help("clip", CompressOptions))] = CompressOptions.clip,
    restore: Annotated[
        bool, typer.Option("--restore/--no-restore", help=option_help("restore", CompressOptions))
    ] = CompressOptions.restore,
    outliers: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", help=option_help("outliers", CompressOptions), show_default=False),
    ] = None,
    bits_budget: Annotated[
        float | None, typer.Option(metavar="BITS", help=option_help("bits_budget", CompressOptions), show_default=False)
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help=option_help("dense", CompressOptions), show_default=False),
    ] = None,
    strict_block: Annotated[
        bool, typer.Option("--strict-block", help=option_help("strict_block", CompressOptions))
    ] = CompressOptions.strict_block,
    activations: Annotated[
        str, typer.Option(help=option_help("activations", CompressOptions))
    ] = CompressOptions.activations,
    activation_scale: Annotated[
        str | None, typer.Option(help=option_help("activation_scale", CompressOptions), show_default=False)
    ] = None,
    activation_range: Annotated[
        str | None, typer.Option(help=option_help("activation_range", CompressOptions), show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help=option_help("dtype", CompressOptions))] = CompressOptions.dtype,
    shard_size: Annotated[
        str, typer.Option(help=option_help("shard_size", CompressOptions))
    ] = CompressOptions.shard_size,
    prompt: PromptOption = DEFAULT_PROMPT,
    seed: Annotated[int, typer.Option(help=option_help("seed", CompressOptions))] = CompressOptions.seed,
    graph: GraphOption = None,
    precision: PrecisionOption = None,
    accuracy_level: AccuracyOption = None,
    lm_head_bits: HeadOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, tensor by tensor; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint already.")] = False,
    as_json: JsonOption = False,
    low_memory: LowMemoryOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compress MODEL into OUT, a checkpoint that stock transformers and vLLM load, or at once into an ONNX folder."""
    export_to = export_options(
        form, {"graph": graph, "precision": precision, "accuracy_level": accuracy_level, "lm_head_bits": lm_head_bits}
    )
    options = CompressOptions(
        bits=bits, block=block, symmetric=symmetric, preset=preset, refine=refine, texts=texts, clip=clip, restore=restore, outliers=outliers, bits_budget=bits_budget, dense=tuple(dense or ()),
        strict_block=strict_block, activations=activations, activation_scale=activation_scale, activation_range=activation_range, dtype=dtype, shard_size=shard_size, prompt=prompt, seed=seed,
    )  # fmt: skip
    from swquant.checkpoints.open import open_checkpoint
    from swquant.compress.pipeline import prepare, write
    from swquant.models.runtime import require_exporter
    from swquant.output.destination import check_destination
    from swquant.terminal.plan import plan_record, show_plan, show_result

    if export_to is not None:
        require_exporter()
    progress = make_progress(as_json)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        target = out_folder if out_folder is not None else Path(checkpoint.name + options.suffix + FORMATS[form])
        if not dry_run:
            check_destination(target, overwrite, checkpoint)
        prepared = prepare(checkpoint, options, low_memory=low_memory, progress=progress)
        if export_to is not None:
            from swquant.export.onnx.pipeline import check_plan, write_exported

            check_plan(prepared)
        if not as_json:
            show_plan(out, prepared, target, every_tensor=dry_run)
        if dry_run:
            if as_json:
                export_record = export_to and export_to.resolved(options.activations != "none").as_dict()
                print_json({**plan_record(prepared, target), "format": form, "export": export_record})
            return
        if export_to is not None:
            show_exported(write_exported(prepared, target, export_to, overwrite=overwrite, progress=progress), as_json)
            return
        result = write(prepared, target, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"path": str(result.path), "manifest": result.manifest})
    else:
        show_result(out, result)


app.command()(export)


@app.command()
def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Show what is in a compressed checkpoint: schemes, outliers, what stayed dense and why, what loads it."""
    from swquant.checkpoints.manifest import read_manifest
    from swquant.terminal.activations import show_activations
    from swquant.terminal.manifest import show_manifest
    from swquant.terminal.onnx import show_onnx_manifest

    manifest = read_manifest(checkpoint)
    if as_json:
        print_json(manifest)
    elif manifest.get("kind") == "onnx":
        show_onnx_manifest(out, checkpoint, manifest)
    else:
        show_manifest(out, checkpoint, manifest)
        show_activations(out, manifest)


@app.command()
def verify(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Read every byte of a compressed checkpoint again and compare it with the manifest."""
    from swquant.checkpoints.manifest import read_manifest
    from swquant.output.verification import verify as verify_checkpoint
    from swquant.units import human_bytes

    problems = verify_checkpoint(checkpoint)
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    elif not problems:
        files = read_manifest(checkpoint)["files"]
        size = human_bytes(sum(record["bytes"] for record in files.values()))
        out.print(f"{escape(str(checkpoint))}: {len(files)} files, {size}, every byte as written", soft_wrap=True)
    for problem in problems if not as_json else ():
        err.print(f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="The text to predict, a UTF-8 file.", show_default=False)],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="ORIGINAL",
            help="Compare with this model: KL divergence, top-1 agreement.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Evaluate only so many windows.", show_default=False)] = None,
    restore: RestoreOption = True,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Exit with 1 above this perplexity.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with 1 above this KL divergence (with --against).", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity on a text; with --against also KL divergence and agreement with the original."""
    from contextlib import ExitStack
    from dataclasses import asdict
    from math import isfinite

    from swquant.checkpoints.compressed import CompressedCheckpoint
    from swquant.checkpoints.open import open_checkpoint
    from swquant.evaluate.pipeline import evaluate_model
    from swquant.terminal.evaluation import show_evaluation
    from swquant.terminal.manifest import show_losses

    if max_kl is not None and against is None:
        raise SwquantError("--max-kl needs an original to compare with; add --against ORIGINAL")
    with ExitStack() as stack:
        content = text_of(text)
        checkpoint = stack.enter_context(open_checkpoint(model, restored=restore, trust_remote_code=trust_remote_code))
        original = (
            stack.enter_context(open_checkpoint(against, trust_remote_code=trust_remote_code)) if against else None
        )
        result = evaluate_model(
            checkpoint, content, original, window=window, limit=limit, progress=make_progress(as_json)
        )
    if as_json:
        # A destroyed model has a perplexity beyond every float, for which JSON has no number.
        print_json({key: value if value is None or isfinite(value) else None for key, value in asdict(result).items()})
    else:
        show_evaluation(out, result)
        if original is not None and isinstance(checkpoint, CompressedCheckpoint):
            show_losses(out, checkpoint.manifest)
    for label, value, bound in (
        ("perplexity", result.perplexity, max_perplexity),
        ("KL divergence", result.kl, max_kl),
    ):
        if bound is not None and value is not None and not value <= bound:
            raise SwquantError(f"{label} {value:.4f} is above the limit {bound:g}")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 40,
    restore: RestoreOption = True,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt, always with the likeliest token."""
    from swquant.api import generate as continue_prompt

    with make_progress(as_json).step("Generating"):
        text = continue_prompt(model, prompt, tokens=tokens, restore=restore, trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        out.print(text, markup=False, soft_wrap=True)


app.command()(study)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices and what is missing."""
    from swquant.doctor import examine
    from swquant.terminal.doctor import show_doctor

    report = examine()
    if as_json:
        print_json(report)
    else:
        show_doctor(out, report)
    if report["missing"]:
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        from swquant.version import __version__

        out.print(f"swquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(words: Sequence[str] | None = None) -> None:
    """Entry point, of the words that the process was started with by default: turns what users can mend into one line on stderr. Typer turns Ctrl-C into exit code 130, and a reader
    that went away (`swquant inspect … | head`) into 1."""
    try:
        app(words, prog_name="swquant")
    except SwquantError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SystemExit as end:
        if end.code == 130:
            err.print("interrupted; nothing half-written was left behind")
        raise


def _fail(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(1)
