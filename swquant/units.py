"""Numbers as people read and write them: sizes, counts, seven significant digits."""

from __future__ import annotations

import re

from exporters.errors import SwquantError

__all__ = ["human_bytes", "parse_bytes", "short", "thousands"]


def parse_bytes(text: str) -> int:
    """`5GB`, `500MB`, `1GiB` or a plain number of bytes. Raises SwquantError for anything else."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units:
        raise SwquantError(f"size {text!r} is not understood; write 5GB, 500MB or 1GiB")
    return int(float(match[1]) * units[match[2].upper()])


def human_bytes(count: float) -> str:
    """1234567 -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def short(value: float, digits: int = 7) -> float:
    """So many significant digits; more than seven would be noise of float32."""
    return float(f"{value:.{digits}g}")


def thousands(value: float) -> str:
    """Four digits, or whole thousands with commas: 0.12346 -> `0.1235`, 24135.6 -> `24,136`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
