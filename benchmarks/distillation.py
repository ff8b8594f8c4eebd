"""Fewer layers, more experts: what students and mixtures are worth, beside fewer bits.

    figure4  a student of 26 of SmolLM2's 30 layers learns WikiText-2 and Python source: without the teacher, with it
             all the way, until 60 % of the steps, and until swquant ends the stage; cross entropy along the way
    table2   from scratch, small, at equal tokens: dense, standard mixture, residual, pyramid, both, and its student
    rival    every student beside the teacher compressed to the same bytes: size, perplexity, KL; the winner is named
    super    where super weights are in students and mixtures, what leaving out their layers does, and rounding them

Each part is a file of `students/`, which says what exactly is done. The layers of the students are fixed (--layers), so
nothing is searched. Seeds draw the order of the text and, in `table2`, the weights; tables have mean ± standard
deviation. Every cell is written into the JSON file when it is done, and another run goes on from there.

The teacher should lie on no 4-bit grid, or rounding it loses nothing (`grid.py`):

    python benchmarks/grid.py SmolLM2.gguf TEACHER
    python benchmarks/distillation.py TEACHER --json distillation.json [--parts figure4 …] [--plots docs/images]

With the defaults most of the time is `figure4`: half an hour of one core. A step of 256 tokens of SmolLM2's student is
3.0 processor seconds, 4.2 with the teacher; there are 16 in each of 24 cells. --device cuda runs it on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from students.figure4 import figure4
from students.report import TABLES, draw
from students.rival import rival
from students.super_weights import super_weights
from students.table2 import table2
from students.world import Results, Settings, World

from swquant.checkpoints.open import open_checkpoint

DATA = Path(__file__).parent.parent / "data"
TEXTS = {"wikitext": DATA / "wikitext2-valid-excerpt.txt", "python": DATA / "python-source.txt"}
OF_TEACHER = {"figure4": figure4, "rival": rival, "super": super_weights}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", help="a model's folder or .gguf file; table2 needs none")
    parser.add_argument("--json", type=Path, default=Path("distillation.json"))
    parser.add_argument("--folder", type=Path, default=Path("distillation"), help="where students are kept for `rival`")
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--plots", type=Path, help="draw the curves of figure4 into this folder")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="instead of WikiText and Python"
    )
    for item in fields(Settings):
        if item.name == "bits":
            parser.add_argument("--bits", type=int, nargs="+", default=list(item.default))
        elif item.name != "folder":
            parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    chosen: dict[str, Any] = {item.name: getattr(args, item.name) for item in fields(Settings)}
    settings = Settings(**{**chosen, "bits": tuple(args.bits)})
    files = dict(text.split("=", 1) for text in args.text) if args.text else TEXTS
    files = {name: Path(file) for name, file in files.items()}
    results = Results(args.json)
    settings.folder.mkdir(parents=True, exist_ok=True)
    if "table2" in args.parts:
        table2(files, settings, results)
    wanted = [part for part in OF_TEACHER if part in args.parts]
    if wanted:
        if args.teacher is None:
            raise SystemExit(f"{', '.join(wanted)}: name the teacher")
        with open_checkpoint(args.teacher) as teacher:
            world = World(teacher, files, settings)
            for part in wanted:
                OF_TEACHER[part](world, results)
    for part in TABLES:
        if cells := results.parts.get(part, {}).get("cells"):
            print(f"\n## {part}\n\n{TABLES[part](cells)}")
    if args.plots is not None and "figure4" in results.parts:
        print(f"\nDrew {draw(results.parts['figure4']['cells'], args.plots)}")


if __name__ == "__main__":
    main()
