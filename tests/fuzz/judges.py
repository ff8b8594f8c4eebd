"""Wrong acceptances: a verb said that all is well, and what it made or loaded is not what the files say.

What the files say is asked of others than swquant: of the safetensors package, of stock transformers, of NumPy. Each
judge yields sentences; none is the right number. What is refused needs no judge but `told_well`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz.mutants import Mutant
from fuzz.worlds import MANIFEST, SIDECAR
from safetensors import safe_open
from safetensors.torch import load_file
from support.plain_decoder import decoded
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

LOSS = 0.35  # relative error of a tensor of 4 bits, its super weights restored
LONGEST = 1600  # characters of a message
# Of the configuration, what compress may change.
OWN_KEYS = ("quantization_config", "swquant", "dtype", "torch_dtype", "architectures", "transformers_version", "auto_map",
            "_name_or_path", "_attn_implementation", "attn_implementation", "_attn_implementation_internal")  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """A verb and how it ended. error: the class of the exception behind exit code 1, "" where there was none."""

    verb: str
    code: int
    out: str
    err: str
    error: str = ""
    value: Any = None


def told_well(ran: Ran, as_json: bool) -> Iterator[str]:
    """What is wrong with what a verb printed."""
    if ran.code not in (0, 1):
        yield f"exit code {ran.code}: {ran.err[-300:]!r}"
    if ran.error not in ("", "SwquantError", "CheckpointError"):
        yield f"a bare {ran.error}: {ran.err[-300:]!r}"
    if "not enough memory" in ran.err:
        yield f"memory: {ran.err[-200:]!r}"
    if odd := [
        character
        for character in ran.out + ran.err
        if unicodedata.category(character) in ("Cc", "Cs", "Cf") and character != "\n"
    ]:
        yield f"prints {odd[:5]!a}"
    if ran.code == 1 and ran.verb != "verify" and as_json:
        lines = ran.err.splitlines()
        if len(lines) != 1 or ran.out or not lines[0].removeprefix("error: ") or len(ran.err) > LONGEST:
            yield f"not one line: out {ran.out[:100]!r}, err {ran.err[:300]!r} ({len(ran.err)})"
        elif "; " not in ran.err and "(" not in ran.err:
            yield f"no remedy: {ran.err!r}"
    if ran.code == 0 and as_json and ran.verb != "load":
        try:
            json.loads(ran.out, parse_constant=lambda word: _no(word))
        except ValueError as error:
            yield f"stdout is not JSON ({error}): {ran.out[:100]!r}"
        if ran.err:
            yield f"stderr {ran.err[:300]!r}"


def _no(word: str) -> None:
    raise ValueError(word)


def judge(mutant: Mutant, ran: Mapping[str, Ran], worlds: Mapping[str, Path], out: Path) -> Iterator[str]:
    """Wrong acceptances of a mutant. out: where compress wrote."""
    if (made := ran.get("compress")) is not None:
        if made.code == 0:
            yield from _compressed(mutant, out)
        elif out.exists():
            yield "compress failed and left OUT"
    if mutant.world in ("compressed", "int8"):
        yield from _checkpoint(mutant, ran, worlds[mutant.world])
    if (
        (loaded := ran.get("load")) is not None
        and loaded.value is not None
        and mutant.world not in ("compressed", "int8")
    ):
        yield from (f"load: {problem}" for problem in _same_state(loaded.value.state_dict(), _stock_or_filed(mutant)))
    spoke = (said := ran.get("generate")) is not None and said.code == 0 and mutant.kind == "safetensors"
    if spoke and any(not torch.isfinite(value).all() for value in _stock(mutant.folder).values()):
        yield "generate: the weights hold NaN or infinity, and it spoke"


def _stock(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What stock transformers makes of a folder. Raises AssertionError for weights that would be random."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    assert not info["missing_keys"], f"stock transformers misses {sorted(info['missing_keys'])[:2]}"
    assert not info["mismatched_keys"], f"stock transformers says mismatched: {sorted(info['mismatched_keys'])[:2]}"
    return dict(model.state_dict())


def _stock_or_filed(mutant: Mutant) -> dict[str, torch.Tensor]:
    """What stock transformers makes of a source; where it does not load it, and of shards, in which it takes any of two
    tensors of one name, what the safetensors package reads where the index says."""
    if mutant.world == "gguf":
        return _stock(mutant.folder, gguf_file=mutant.model.name)
    try:
        if mutant.world != "sharded":
            return _stock(mutant.folder)
    except Exception:
        return load_file(mutant.folder / "model.safetensors")
    table = json.loads((mutant.folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    shards = {path.name: load_file(path) for path in sorted(mutant.folder.glob("*.safetensors"))}
    found = {name: value for shard in shards.values() for name, value in shard.items()}
    return {name: shards[table[name]][name] if name in table else value for name, value in found.items()}


def _same_state(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], loss: float = 0.0
) -> Iterator[str]:
    if ours.keys() != theirs.keys():
        yield f"other weights: {sorted(ours.keys() ^ theirs.keys())[:2]}"
    for name in ours.keys() & theirs.keys():
        a, b = ours[name].to(torch.float64), theirs[name].to(torch.float64)
        if a.shape != b.shape:
            yield f"{name} has another shape"
        elif not torch.isfinite(a).all():
            yield f"{name} holds NaN or infinity"
        elif (a - b).norm() > (loss + (1e-6 if ours[name].dtype == theirs[name].dtype else 5e-3)) * b.norm() + 1e-30:
            yield f"{name} differs by {(a - b).norm() / b.norm():.3g}"


def _compressed(mutant: Mutant, out: Path) -> Iterator[str]:
    """A compressed model against its damaged source."""
    import swquant

    if problems := swquant.verify(out):
        yield f"compress: what it wrote does not verify: {problems[0]}"
    try:
        stock = _stock(out)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([[5, 9, 17]])).logits
    except Exception as error:
        yield f"compress: stock transformers cannot load OUT: {type(error).__name__}: {str(error)[:200]}"
        return
    if any(not torch.isfinite(value.to(torch.float32)).all() for value in stock.values()):
        yield "compress: OUT holds NaN or infinity"
    if not torch.isfinite(logits).all():
        yield "compress: OUT says NaN"
    source = _stock_or_filed(mutant)
    yield from (f"compress: {problem}" for problem in _same_state(swquant.load(out).state_dict(), source, LOSS))
    if mutant.world != "gguf":
        yield from _same_companions(mutant.folder, out)


def _same_companions(source: Path, out: Path) -> Iterator[str]:
    """Configuration, generation configuration and tokenizer are handed on as they are."""
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (out, source))
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in OWN_KEYS and repr(ours.get(key)) != repr(theirs.get(key)):
            yield f"compress: config.json has {key} = {str(ours.get(key))[:60]}, the source {str(theirs.get(key))[:60]}"
    if type(ours) is not type(theirs):
        yield "compress: another class of configuration"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file() and not (out / name).is_file():
            yield f"compress: {name} is not handed on"
    if (out / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(out)
        except Exception as error:
            yield f"compress: hands on a generation_config.json that transformers refuses: {str(error)[:150]}"


def _checkpoint(mutant: Mutant, ran: Mapping[str, Ran], sound: Path) -> Iterator[str]:
    """A damaged checkpoint: what verifies can be loaded, and what is loaded is what the files say, and were to say."""
    verified, loaded = ran["verify"], ran["load"]
    sealed = mutant.what.endswith("; sealed")
    if verified.code == 0 and not sealed and (changed := _changed(mutant.folder, sound)):
        yield f"verify: passes though {changed} changed"
    if verified.code == 0 and (lies := _lies(mutant.folder)):
        yield f"verify: passes though {lies}"
    if verified.code == 0 and mutant.kind != "made" and loaded.value is None:
        yield f"verify: passes, but load says {loaded.err[:200]!r}"
    if loaded.value is None:
        return
    expected = _meant(mutant.folder if sealed else sound)
    listed = json.loads((sound / MANIFEST).read_bytes())["tensors"]
    expected = {name: value for name, value in expected.items() if name in listed}
    weights = {name: value for name, value in loaded.value.state_dict().items() if name in expected}
    yield from (f"load: {problem}" for problem in _same_state(weights, expected))


def _changed(folder: Path, sound: Path) -> str | None:
    for path in sorted(sound.rglob("*")):
        other = folder / path.relative_to(sound)
        if path.is_file() and (not other.is_file() or other.read_bytes() != path.read_bytes()):
            return path.relative_to(sound).as_posix()
    return None


def _lies(folder: Path) -> str | None:
    """A hash of the manifest that is not true."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            return f"{name} is not what is hashed"
    for record in manifest["tensors"].values():
        data = (folder / record["file"]).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for part, digest in record["sha256"].items():
            begin, end = header[part]["data_offsets"]
            if hashlib.sha256(data[start + begin : start + end]).hexdigest() != digest:
                return f"{part} is not what is hashed"
    return None


def _meant(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint stands for, decoded with NumPy, its patches laid over them."""
    weights = decoded(folder)
    if not (folder / SIDECAR).is_file():
        return weights
    with safe_open(folder / SIDECAR, "pt") as file:
        sets = json.loads(file.metadata()["sets"])
    parts = load_file(folder / SIDECAR)
    for of_set in sets:
        for name in [key for key in parts if key.startswith(f"{of_set}/") and key.endswith(".values")]:
            stem = name.removesuffix(".values")
            weight = weights[stem.removeprefix(f"{of_set}/")]
            rows, cols = parts[f"{stem}.rows"].long(), parts[f"{stem}.cols"].long()
            weight[rows, cols] = parts[name].to(weight.dtype)
    return weights
