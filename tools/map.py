"""The map in docs/architecture.md, made from the first sentence of every file: `python tools/map.py` writes it anew."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("calibrationless", "exporters", "swquant")
SOURCES = (".py", ".h", ".cc", ".cu")
_MAP = re.compile(r"(## The map\n\n```text\n).*?(```\n)", re.DOTALL)


def first_sentence(path: Path) -> str:
    """Of a module's docstring, or of the comment that a C++ file begins with (a header speaks for its .cc)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        paragraph = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    else:
        comment = re.match(r"(?://[^\n]*\n)+", text)
        paragraph = comment[0].partition("\n//\n")[0] if comment else f"see {path.stem}.h"
        paragraph = re.sub(r"^// ?", "", paragraph, flags=re.MULTILINE)
    words = " ".join(paragraph.split())
    return re.split(r"(?<=[a-z)`]{2})[.:] ", words, maxsplit=1)[0].removesuffix(".") if len(words) > 100 else words


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """The folder, its files, its sub-folders."""
    indent = "  " * depth
    says = first_sentence(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
    yield f"{indent}{folder.name}/".ljust(28) + says
    for path in sorted(path for path in folder.iterdir() if path.suffix in SOURCES and path.name != "__init__.py"):
        yield f"{indent}  {path.name}".ljust(28) + first_sentence(path)
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"):
        yield from lines(path, depth + 1)


def drawn() -> str:
    """The map of the sources as they are."""
    return "\n".join(line.rstrip() for package in PACKAGES for line in lines(ROOT / package)) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_MAP.sub(lambda match: match[1] + drawn() + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
