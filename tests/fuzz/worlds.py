"""Sound files to be damaged: a model in one file and in shards, a GGUF file, checkpoints that swquant made of it.

All are made once, tiny, and copied for every mutant. `sealed` writes the hashes of a compressed checkpoint anew, as
somebody does who damages it on purpose: what then stands in the way is not a hash, but whether the content makes sense.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from support.tiny_gguf import PROMPT as GGUF_PROMPT
from support.tiny_gguf import write_gguf
from support.tiny_models import PROMPT, plant, planted_model, sample_text, save_model, tiny_model

import swquant

MANIFEST, SIDECAR = "swquant/manifest.json", "swquant/outliers.safetensors"
PROMPTS = {"gguf": GGUF_PROMPT}
TEXT = sample_text(48)


def prompt_of(world: str) -> str:
    return PROMPTS.get(world, PROMPT)


def make_worlds(folder: Path) -> dict[str, Path]:
    """World -> its folder."""
    source = planted_model("llama", folder / "source", torch.bfloat16, num_hidden_layers=2).folder
    sharded = tiny_model("llama", num_hidden_layers=2)
    plant(sharded)
    save_model(sharded, folder / "sharded", torch.bfloat16, max_shard_size="64KB")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf")
    swquant.compress(source, folder / "compressed", prompt=PROMPT, preset="fast", block="32", outliers=0.01)
    int8: dict[str, Any] = {"activations": "int8", "activation_range": "static", "block": "32"}
    swquant.compress(source, folder / "int8", prompt=PROMPT, dense=("layers.0.self_attn",), **int8)
    return {path.name: path for path in folder.iterdir()}


def copied(world: Path, place: Path) -> Path:
    return Path(shutil.copytree(world, place))


def sealed(folder: Path) -> None:
    """Write sizes and hashes of all files and tensors into the manifest of a damaged checkpoint, and its digest. A
    manifest that is damaged itself only gets its digest, where it can have one."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if not all(_readable(folder / name) for name in manifest["files"]):
            return
        for name, entry in manifest["files"].items():
            data = (folder / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        hashes = {name: _tensor_hashes(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
        for record in manifest["tensors"].values():
            known = hashes.get(record["file"], {})
            record["sha256"] = {part: known.get(part, old) for part, old in record["sha256"].items()}
        path.write_text(json.dumps(manifest))
        seal_manifest(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    seal_manifest(path)


def seal_manifest(path: Path) -> None:
    """Give a manifest the digest of what it says, in the bytes that it is written in."""
    if not _readable(path):
        return
    try:
        manifest = json.loads(path.read_bytes())
        text = json.dumps({**manifest, "digest": ""}, sort_keys=True)
        manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogatepass"
        )
    except (OSError, ValueError, TypeError, RecursionError):  # damaged beyond that
        pass


def _readable(path: Path) -> bool:
    """Whether a path is a file of a size that can be read: no pipe, nothing endless."""
    return path.is_file() and path.stat().st_size < 1 << 28


def _tensor_hashes(path: Path) -> dict[str, str]:
    """Part -> sha256 of its bytes; nothing of a file that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        spans = {name: header[name]["data_offsets"] for name in names}
        return {name: hashlib.sha256(data[start + a : start + b]).hexdigest() for name, (a, b) in spans.items()}
    except Exception:
        return {}
