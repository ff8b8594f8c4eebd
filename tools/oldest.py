"""The oldest dependencies that pyproject.toml promises, as constraints for pip: `tools/oldest.py cpu > oldest.txt`.

Of a package that is named more than once, in the project's own dependencies and in the extras that are asked for, the
highest bound counts. What those packages need themselves is pip's choice, as for a user.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_BOUND = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)(?:,<[\d.]+)?")


def oldest(extras: list[str], pyproject: Path = PROJECT) -> dict[str, str]:
    """Package -> the oldest version. Raises ValueError for a dependency without a lower bound."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for words in [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]:
        for word in words:
            if word.startswith(f"{project['name']}["):
                continue
            match = _BOUND.fullmatch(word)
            if match is None:
                raise ValueError(f"{word!r} has no lower bound; write NAME>=VERSION")
            name, version = match.groups()
            found[name] = max(found.get(name, version), version, key=lambda text: [int(n) for n in text.split(".")])
    return found


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in oldest(sys.argv[1:]).items()), sep="\n")
