"""`swquant doctor`: what is installed, and what is missing."""

from __future__ import annotations

import typer

from swquant.cli.shared import JsonOption, out, print_json

__all__ = ["doctor"]


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
