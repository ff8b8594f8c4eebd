"""The command line. Each command is thin: parse, call the same function that Python users call, show the result."""

from swquant.cli.main import app, main

__all__ = ["app", "main"]
