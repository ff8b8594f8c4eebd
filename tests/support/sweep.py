"""One architecture from a tiny random model to what stock transformers makes of the compressed checkpoint, in one word.

    python tests/support/sweep.py RESULTS.json [MODEL_TYPE …]

goes through all of them, or those named, and goes on where it was stopped; `--table docs/architectures.md` writes the
page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from support import every_architecture
from support.plain_decoder import decoded
from transformers import AutoConfig, PreTrainedModel

import swquant
from swquant.models.stock import auto_class

# What a model takes beside text.
_INPUTS = re.compile(
    r"\b(\w*(?:pixel_values|flattened_patches|image_embeds|image_encoder_embeddings|qformer_input_ids)|state)\b"
)
RIGHT, REFUSED, NOT_BUILT = "right", "refused", "not built"


def _stock(folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The folder as a user of stock transformers loads it."""
    auto = auto_class(AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, output_loading_info=True, **options)


def outcome(model_type: str, work: Path) -> dict[str, Any]:
    """{outcome, detail, packed, share}: what becomes of one architecture."""
    source, out = work / "source", work / "out"
    try:
        built = every_architecture.build(model_type)
        every_architecture.save(built, source)
        original, info = _stock(source)
        every_architecture.logits_of(original)
    except Exception as error:  # transformers raises nearly everything here
        return {"outcome": NOT_BUILT, "detail": _why_not(error)}
    if lost := len(info["missing_keys"]):
        kinds = f"{type(original).__name__} does not find {lost} weights in what {type(built).__name__} saved"
        return {"outcome": NOT_BUILT, "detail": f"stock transformers: {kinds}"}
    try:
        manifest = swquant.compress(source, out, bits=4, block="32").manifest
    except swquant.SwquantError as error:
        return {"outcome": REFUSED, "detail": str(error).removeprefix("source: ")}
    except Exception as error:
        return {"outcome": "crashed", "detail": f"{type(error).__name__}: {error}"}
    packed = [name for name, record in manifest["tensors"].items() if "bits" in record]
    found = {"packed": len(packed), "dense": _dense(manifest)}
    if problems := swquant.verify(out):
        return {"outcome": "does not verify", "detail": problems[0], **found}
    try:
        stock, info = _stock(out)
        logits = every_architecture.logits_of(stock)
    except Exception as error:
        return {"outcome": "stock loader fails", "detail": f"{type(error).__name__}: {error}", **found}
    if info["missing_keys"] or info["mismatched_keys"]:
        return {"outcome": "loads wrong", "detail": f"{len(info['missing_keys'])} weights are random", **found}
    plain = type(original).from_pretrained(None, config=original.config, state_dict=decoded(out)).eval()
    dense = every_architecture.logits_of(plain)
    plain.config._is_quantized = True  # falcon_mamba's own code adds and takes away a bias where it finds this set
    packed = every_architecture.logits_of(plain)
    ours = every_architecture.logits_of(swquant.load(out, restore=False))
    for name, other, expected in (("stock transformers", logits, packed), ("swquant.load", ours, dense)):
        if not torch.equal(other, expected):
            difference = float((other - expected).abs().max())
            return {"outcome": "loads wrong", "detail": f"{name} is {difference:.3g} off a plain decoder", **found}
    return {"outcome": RIGHT, "detail": "", **found}


def _why_not(error: Exception) -> str:
    """Why a model does not come to run on text, in few words where it is what the architecture wants."""
    text = str(error)
    if isinstance(error, ImportError) and (
        library := re.search(r"requires the (\S+) library|module named '(\S+)'", text)
    ):
        return f"transformers needs {library[1] or library[2]} for it"
    if wanted := list(dict.fromkeys(_INPUTS.findall(text))):
        return f"does not run on text alone: it wants {', '.join(wanted)}"
    return f"{type(error).__name__}: {text}"


def _dense(manifest: Any) -> dict[str, int]:
    """Reason -> matrices that stay dense for it, those aside that always do."""
    usual = ("not a matrix", "embedding", "lm_head", "router")
    reasons = (record["dense"] for record in manifest["tensors"].values() if "dense" in record)
    return dict(Counter(reason for reason in reasons if reason not in usual))


def sweep(results: Path, types: list[str]) -> dict[str, dict[str, Any]]:
    """Outcomes of all types, those in the file taken from it."""
    done: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else {}
    for number, model_type in enumerate(types, start=1):
        if model_type in done:
            continue
        work = Path(tempfile.mkdtemp(prefix="swquant-sweep-"))
        try:
            done[model_type] = outcome(model_type, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        detail = re.sub(r"\s+", " ", done[model_type]["detail"])[:160].replace(str(work), "…")
        done[model_type]["detail"] = detail
        results.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
        print(f"{number}/{len(types)} {model_type}: {done[model_type]['outcome']} {detail}", flush=True)
    return {model_type: done[model_type] for model_type in types}


def page(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "# Architectures",
        "",
        f"Every model type that the causal and the image-text Auto classes of transformers {transformers.__version__} know, "
        "as a tiny random model: compressed to 4 bits in blocks of 32, verified, loaded by stock transformers and by "
        "`swquant.load`, and both compared, to the bit, with a plain decoder of the format that shares no code with "
        "swquant. `make architectures` writes this page.",
        "",
    ]
    for title, types in (("Causal", every_architecture.CAUSAL), ("Image and text", every_architecture.IMAGE_TEXT)):
        own = {name: done[name] for name in types if name in done}
        counts = ", ".join(
            f"{count} {name}" for name, count in Counter(r["outcome"] for r in own.values()).most_common()
        )
        lines += [
            f"## {title}",
            "",
            f"{len(own)} types: {counts}.",
            "",
            "| type | outcome | packed | what stays dense, or why |",
        ]
        lines += ["|---|---|---:|---|"]
        for name, record in sorted(own.items()):
            dense = "; ".join(f"{count} {reason}" for reason, count in record.get("dense", {}).items())
            text = (record["detail"] or dense).replace("|", "\\|")
            lines.append(f"| {name} | {record['outcome']} | {record.get('packed', '')} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    done = sweep(given.results, given.types or list(every_architecture.MODEL_TYPES))
    if given.table:
        given.table.write_text(page(done))


if __name__ == "__main__":
    main()
