"""`make study`: the figures of docs/study.md, from the two real models.

Runs the commands that a user would type, and copies their figures. Block sizes are studied on weights off the grid that
the GGUF files were stored on (see benchmarks/grid.py): blocks that fall on the old grid would lose nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
TEXT = PROJECT / "data" / "wikitext2-excerpt.txt"
IMAGES = PROJECT / "docs" / "images" / "study"
FIGURES = (
    "identify-output.svg", "importance.svg", "persistence.svg", "tokens.svg", "amplification.svg", "block-size.svg", "activations.svg",
)  # fmt: skip
ON_GRID = ("identify", "importance", "persistence", "stopwords", "amplification", "activations")


def run(*command: str) -> None:
    """Show a command and run it."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command])
    if result.returncode:
        sys.exit(result.returncode)


def study(model: Path, out: Path, only: tuple[str, ...]) -> None:
    words = [word for name in only for word in ("--only", name)]
    run("-m", "swquant", "study", str(model), "--text", str(TEXT), "--out", str(out), *words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL.gguf", help="name of the figures, and model")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="where the reports go (default: study)")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for word in options.models:
        name, _, model = word.partition("=")
        reports = {"": options.folder / name, "off the grid": options.folder / f"{name}-off-grid"}
        study(Path(model), reports[""], ON_GRID)
        broken = options.folder / f"{name}-weights"
        if not (broken / "config.json").is_file():
            run(str(PROJECT / "benchmarks" / "grid.py"), model, str(broken))
        study(broken, reports["off the grid"], ("block-size",))
        for report in reports.values():
            for figure in FIGURES:
                if (report / "figures" / figure).is_file():
                    shutil.copy(report / "figures" / figure, IMAGES / f"{name}-{figure}")
            for section in json.loads((report / "study.json").read_text(encoding="utf-8"))["sections"]:
                print(f"{name}, {section['name']}: {section['finding']}\n")


if __name__ == "__main__":
    main()
