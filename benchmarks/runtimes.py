"""Which ONNX Runtime runs which exported file, and how exactly: the table in docs/onnx.md.

    python benchmarks/runtimes.py [--versions 1.20.1 1.27.0 1.31.1 1.32.0]

A small random llama is compressed to 4 and to 3 bits in bfloat16, with a hundredth of its weights as outliers, and
exported from both graphs at both accuracy levels. Every version of the runtime is installed into a folder of its own
and opens every file twice: as it is, which runs the function, and with the operator library. Printed is the largest
difference of a logit from the torch model, over a prompt and eight more tokens through the cache, as a share of the
range of all logits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import swquant
from exporters.errors import SwquantError, first_line
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.loading import build_model
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import open_session

VERSIONS = ("1.20.1", "1.27.0", "1.31.1", "1.32.0")
VOCABULARY, TOKENS = 128, 8
KINDS = tuple(itertools.product(("dynamo", "genai"), (4, 3), (0, 4)))  # graph, bits, accuracy level


def make_model(folder: Path) -> None:
    """A llama of two layers with massive channels, and a word for each of its tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter[5] = 30  # a massive channel behind every norm
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(folder)


def make_files(work: Path) -> None:
    """The exported folders, named as in `KINDS`, and what torch says of each number of bits."""
    make_model(work / "model")
    prompt = " ".join(f"t{3 + 11 * index % 120}" for index in range(10))
    for bits in (4, 3):
        checkpoint = work / f"w{bits}"
        swquant.compress(
            work / "model", checkpoint, bits=bits, block="32", outliers=0.01, dtype="bfloat16", prompt=prompt
        )
        with CompressedCheckpoint(checkpoint, unrounded=True) as opened, torch.no_grad():
            model = build_model(opened, torch.float32)
            ids = torch.arange(2, 14).unsqueeze(0)
            chosen = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=1)
            np.savez(work / f"w{bits}.npz", ids=chosen.numpy(), logits=model(input_ids=chosen).logits.numpy())
        for graph, level in itertools.product(("dynamo", "genai"), (0, 4)):
            swquant.export(checkpoint, work / f"{graph}-{bits}-{level}", graph=graph, accuracy_level=level)


def difference(folder: Path, reference: Path, library: bool) -> float | str:
    """Of a file on the runtime that this process imports, or what the runtime said."""
    known = np.load(reference)
    ids, expected = known["ids"], known["logits"]
    try:
        model = OnnxModel(open_session(folder / "model.onnx", library=library), None)
        logits, past = model.step(ids[:, :-TOKENS], model.empty_past(1))
        parts = [logits]
        for token in ids[0, -TOKENS:]:
            logits, past = model.step(np.array([[token]]), past)
            parts.append(logits)
    except SwquantError as error:
        return first_line(error)
    return float(np.abs(np.concatenate(parts, axis=1) - expected).max() / np.ptp(expected))


def run_version(version: str, work: Path) -> dict[str, list[float | str]]:
    """Name of a file -> [stock, with the library], measured in a process of its own."""
    packages = work / f"onnxruntime-{version}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"onnxruntime=={version}"]
    subprocess.run([str(word) for word in pip], check=True, capture_output=True)
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--one", version, str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def run_one(version: str, work: Path) -> None:
    import onnxruntime

    assert onnxruntime.__version__ == version
    names = [f"{graph}-{bits}-{level}" for graph, bits, level in KINDS]
    found = {
        name: [difference(work / name, work / f"w{name.split('-')[1]}.npz", library) for library in (False, True)]
        for name in names
    }
    print(json.dumps(found))


def cell(values: list[float | str]) -> str:
    if all(isinstance(value, str) for value in values):
        return "refused"
    return " / ".join(f"{value:.0e}" if isinstance(value, float) else "refused" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one[0], Path(arguments.one[1]))
        return
    with tempfile.TemporaryDirectory(prefix="swquant-runtimes-") as scratch:
        work = Path(scratch)
        make_files(work)
        found = {version: run_version(version, work) for version in arguments.versions}
    print(f"| graph, bits, accuracy level | {' | '.join(arguments.versions)} |")
    print("|---|" + "---|" * len(arguments.versions))
    for graph, bits, level in KINDS:
        cells = [cell(found[version][f"{graph}-{bits}-{level}"]) for version in arguments.versions]
        print(f"| {graph}, {bits}, {level} | {' | '.join(cells)} |")
    for version, of in found.items():
        for name, values in of.items():
            for value in values:
                if isinstance(value, str):
                    print(f"{version}, {name}: {value}", file=sys.stderr)


if __name__ == "__main__":
    main()
