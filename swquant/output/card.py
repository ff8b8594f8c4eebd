"""README.md of a checkpoint or of patches alone, its card: what the folder is, for whoever opens it anywhere.

It is made of what the manifest says, so equal checkpoints have equal cards: no date, no path, no name of OUT. Names of
models and tensors come from files; they stand in code spans, without what would end one, and the YAML block at the top
is written by a library. The card is text for people, and whoever publishes the folder may rewrite it: the manifest
lists it, `verify` does not compare its bytes. `eval --card` puts its numbers between two comments.

The original's own README.md describes another model and is not copied; its license is named here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.errors import SwquantError
from exporters.sidecar import SIDECAR
from exporters.text import shown
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.manifest import MANIFEST, rounded
from swquant.checkpoints.origin import CARD
from swquant.checkpoints.schema import CheckpointContent, PatchesContent, TensorRecord
from swquant.output.destination import write_whole, writing
from swquant.units import human_bytes

__all__ = ["Measured", "add_evaluation", "read_card", "write_card", "write_patches_card"]

_BEGIN, _END = "<!-- swquant evaluation -->", "<!-- end of swquant evaluation -->"
_HEAD = "| text | read by | tokens | windows | perplexity | original | KL divergence, nats | same first token |"
_SHOWN = 8  # rows of a table whose length a file decides
# What a loader of the table is called with; PATH is the folder, or its name on the hub.
_HOW = {
    "swquant.load": """\
```python
import swquant

model = swquant.load("PATH")
```
""",
    "transformers": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", device_map="cpu")
```
""",
    "vLLM": """\
```bash
vllm serve PATH
```
""",
}


def _code(text: object) -> str:
    """Text from a file as a code span that it cannot leave, in a table either."""
    return f"`{shown(text, 120).replace('`', chr(39)).replace('|', '¦') or ' '}`"


def _plain(text: object) -> str:
    """A sentence of ours that may quote names from a file: nothing in it is Markdown, HTML or a link."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~&!$@])", r"\\\1", shown(text))
    return re.sub(r"(?i)(https?|ftp|www)([:.])", r"\1\\\2", escaped)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _metadata(source: ModelFolder, relation: str, tags: Sequence[str], library: str | None) -> str:
    """The YAML block. The hub refuses a base_model that is no repository, so a name of a folder is none."""
    from huggingface_hub import ModelCardData

    architectures = getattr(source.config, "architectures", None) or ()
    data = ModelCardData(
        license=source.license,
        library_name=library,
        pipeline_tag="text-generation" if any(name.endswith("ForCausalLM") for name in architectures) else None,
        base_model=source.repository,
        base_model_relation=relation if source.repository else None,
        tags=["swquant", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _tags(content: CheckpointContent) -> list[str]:
    bits = {record["bits"] for record in rounded(content["tensors"]).values()}
    plain = content["options"].get("offsets", "none") == "none"
    return ["quantized", *(["compressed-tensors"] if plain else []), *(f"{n}-bit" for n in sorted(bits))]


def _named(source: ModelFolder, name: str) -> str:
    """The original: a link to its page where that is known."""
    page = f"[{source.repository}](https://huggingface.co/{source.repository})"
    return page if source.repository else _code(name)


def _numbers(how: str) -> str:
    """The section that `eval --card` writes into. how: what measures it."""
    return f"## Evaluation\n\n{_BEGIN}\n\nNot measured: `{how}`\n\n{_END}\n"


def _said(source: ModelFolder, content: CheckpointContent) -> str:
    """One paragraph: what was done."""
    options, totals = content["options"], content["totals"]
    bits = (
        f"{options['bits']} bits" if options["bits_budget"] is None else f"{options['bits_budget']:g} bits on average"
    )
    size = sum(record["bytes"] for record in content["tensors"].values())
    inputs = "" if options["activations"] == "none" else " Inputs of these layers are rounded to 8 bits."
    asked = {"the embedding": options.get("embedding_bits"), "the output head": options.get("lm_head_bits")}
    tables = ", ".join(f"{name} to {number} bits" for name, number in asked.items() if number)
    inputs += f" Rounded, too: {tables} (and what is tied to it)." if tables else ""
    return (
        f"Weights of {_named(source, content['source']['name'])}, rounded to {bits} in blocks of "
        f"{_code(options['block'])} by swquant {content['swquant']}, without calibration data: "
        f"{human_bytes(totals['source_bytes'])} became {human_bytes(size)}, {totals['bits_per_quantized_weight']:.3f} bits "
        f"for each rounded weight.{inputs}\n"
    )


def _kept(tensors: Mapping[str, TensorRecord]) -> str:
    """What was not rounded."""
    codes = rounded(tensors)
    outliers = sum(record["outliers"] for record in codes.values())
    lines = [f"- {outliers:,} weights of {len(codes)} rounded tensors, exactly, in `{SIDECAR}`\n"] if outliers else []
    blocks: Counter[str] = Counter()
    dense: dict[str, list[int]] = {}
    for record in tensors.values():
        blocks.update(record.get("blocks", {}))
        if "dense" in record:
            dense.setdefault(record["dense"], []).append(record["bytes"])
    lines += [f"- {count:,} trained blocks, the set {_code(name)}, in `{SIDECAR}`\n" for name, count in blocks.items()]
    lines += [
        f"- {len(sizes)} tensors ({human_bytes(sum(sizes))}) as they were: {_plain(reason)}\n"
        for reason, sizes in dense.items()
    ]
    points = [
        (_code(name), f"{point['row']}, {point['col']}", f"{point['value']:g}", f"{point['without_sidecar']:g}")
        for name, record in codes.items()
        for point in record.get("super_weights", ())
    ]
    if points:
        lines.append("\n" + _table(("super weight of", "row, column", "value", "without the sidecar"), points[:_SHOWN]))
    if len(points) > _SHOWN:
        lines.append(f"\nand {len(points) - _SHOWN} more super weights.\n")
    return "".join(lines)


def _how(loaders: Mapping[str, str]) -> str:
    """How each loader of the table that takes it is called."""
    taken = {loader for loader, verdict in loaders.items() if not verdict.startswith("no")}
    return "\n".join(f"{loader}:\n\n{how}" for loader, how in _HOW.items() if loader in taken)


def write_card(folder: Path, source: ModelFolder, content: CheckpointContent) -> None:
    """Write README.md, in the place of one that is there. content: of the manifest, its `files` and the bytes of all of
    them aside, which are not known yet."""
    loaders = _table(("loader", ""), [(loader, _plain(verdict)) for loader, verdict in content["loaders"].items()])
    notes = "".join(f"- {_plain(note)}\n" for note in content["notes"][:_SHOWN])
    parts = [
        f"{_metadata(source, 'quantized', _tags(content), 'transformers')}\n# {_code(content['source']['name'])}, compressed\n\n"
        f"{_said(source, content)}",
        f"## How to load it\n\n{loaders}\nPATH is this folder, or its name on the hub.\n\n{_how(content['loaders'])}",
        "ONNX Runtime, llama.cpp: `swquant export PATH FOLDER`, `swquant export PATH FILE.gguf`.\n",
        f"## What was kept\n\n{_kept(content['tensors'])}",
        *([f"## Notes\n\n{notes}"] if notes else []),
        _numbers("swquant eval PATH --text FILE --against ORIGINAL --card"),
        f"`{MANIFEST}` holds every option, error and checksum; `swquant verify PATH` compares the files with it.\n",
    ]
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8", newline="\n")


def write_patches_card(folder: Path, source: ModelFolder, content: PatchesContent) -> None:
    """Write README.md of patches alone. source: the model that they belong to. content: as for `write_card`."""
    sets = "".join(
        f"- {record['blocks']:,} blocks of {record['options']['block']} x {record['options']['block']}, the set {_code(name)}, "
        f"trained for {record['options']['steps']} steps on {_plain(record['data'])}: held-out loss "
        f"{record['held_out_before']:.4f}, then {record['held_out_after']:.4f} nats per token\n"
        for name, record in content["tuned"].items()
    )
    name = content["source"]["name"]
    parts = [
        f"{_metadata(source, 'adapter', ['patches'], None)}\n# {_code(name)}, patches\n\n"
        f"Blocks of weights that are laid over {_named(source, name)}, trained by swquant {content['swquant']}. They belong to "
        "that very model, whose weights are not in here.\n",
        f"## What is in it\n\n{sets}",
        "## How to load it\n\nPATH is this folder, or its name on the hub; MODEL is the model.\n\n"
        '```python\nimport swquant\n\nmodel = swquant.load("PATH", base="MODEL")\n```\n\n'
        "`swquant generate PATH TEXT --base MODEL` lets it write; `swquant merge PATH WHOLE --base MODEL` writes the whole "
        "model, which every loader takes.\n",
        _numbers("swquant eval PATH --base MODEL --text FILE --against MODEL --card"),
        f"`{MANIFEST}` holds every option and checksum; `swquant verify PATH` compares the files with it.\n",
    ]
    (folder / CARD).write_text("\n".join(parts), encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Measured:
    """A row of the evaluation. text: the name of what was read. restored: whether the sidecar was laid over. tokens,
    windows: that were read. Without an original the last three are None; kl in nats, top1 from 0 to 1."""

    text: str
    restored: bool
    tokens: int
    windows: int
    perplexity: float
    original: float | None
    kl: float | None
    top1: float | None

    @property
    def key(self) -> str:
        """The cells that a row is known by: another measurement of the same replaces it."""
        return f"| {_code(self.text)} | {'swquant' if self.restored else 'stock loaders'} |"

    @property
    def row(self) -> str:
        """A line of the table."""
        cells = [f"{self.tokens:,}", f"{self.windows:,}", f"{self.perplexity:.4f}"]
        if self.original is not None:
            cells += [f"{self.original:.4f}", f"{self.kl:.5f}", f"{self.top1:.2%}"]
        return f"{self.key} {' | '.join([*cells, *[''] * (6 - len(cells))])} |"


def read_card(folder: Path) -> str:
    """The card of a checkpoint that an evaluation can be written into. Raises SwquantError where there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise SwquantError(
            f"{folder}: its {CARD} cannot be read ({why}); give a checkpoint that compress wrote"
        ) from None
    if _END not in text.partition(_BEGIN)[2]:
        raise SwquantError(
            f"{folder}: its {CARD} lacks the lines {_BEGIN} and {_END}; put them where numbers may stand"
        )
    return text


def add_evaluation(folder: Path, measured: Measured) -> None:
    """Write one more row into the card of a checkpoint, or another one in its place. Raises SwquantError."""
    before, _, rest = read_card(folder).partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    rows = [line for line in inside.splitlines() if line.startswith("| `") and not line.startswith(measured.key)]
    lines = [_HEAD, "| --- " * _HEAD.count(" | ") + "| --- |", *rows, measured.row]
    text = f"{before}{_BEGIN}\n\n" + "\n".join(lines) + f"\n\n{_END}{after}"
    with writing(folder):
        write_whole(folder / CARD, text.encode())
