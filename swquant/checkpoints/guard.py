"""What other libraries say: exceptions of the tokenizer library made messages, warnings of transformers left out.

The tokenizer library is written in Rust, and what it does not expect is a panic there. pyo3 turns that into
PanicException, which derives from BaseException: it passes every `except Exception` and looks like the end of the
program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from exporters.errors import SwquantError, first_line

__all__ = ["failures_of", "silent_stdout", "silent_transformers"]


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No warnings on stderr from transformers about a file that it reads: what matters, swquant says itself."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Nothing on standard output from libraries that print there, below Python: the tokenizer library names what it
    does not know in a file, in the file's own words, between the lines of `--json`."""
    try:
        sys.stdout.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, AttributeError):  # there is no standard output
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def failures_of(what: str, remedy: str) -> Iterator[None]:
    """Whatever a tokenizer library raises inside becomes one SwquantError: `what (its words); remedy`."""
    try:
        yield
    except SwquantError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C, the end of the program
        raise SwquantError(f"{what} ({first_line(error)}); {remedy}") from None
