"""What lies beside the weights: the files that a loader wants, which of them are copied, and which are left behind.

Copied: tokenizers, templates, processors, generation settings, licenses. Python files only where the user trusts them,
and then all of them, since one imports the other; pickles and programs never. What is not copied is listed, so that
nobody misses it later. A folder from elsewhere may hold links: they are followed inside the folder and into the hub's
cache, where every file is one, and nowhere else, or OUT would publish what they point at.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporters.errors import SwquantError
from exporters.json_file import read_json, read_json_value
from exporters.text import shown
from swquant.checkpoints.generation import GENERATION, read_generation

__all__ = ["CODE", "COMPANIONS", "NEVER", "check_readable", "copy_companions", "left_behind", "without_lost_code"]

# Everything a loader may want beside the weights; weights and our own files are written, not copied.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "generation_config.json", "chat_template*", "preprocessor_config.json", "processor_config.json", "LICENSE*",
    "additional_chat_templates/*.jinja", "*processor_config.json", "feature_extractor*.json", "tekken.json",
    "spiece*", "*.bpe", "bpe.codes", "normalizer.json", "emoji.json", "modules.json", "*_Pooling/config.json",
    "*_Dense/config.json", "sentence_*_config.json", "config_sentence_transformers.json", "configuration.json",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Only where the user trusts it.
CODE = ("*.py", "custom_generate/*.py")
# Weights, pickles and programs, by the ends of their names.
NEVER = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".so", ".dll", ".exe",
    ".dylib", ".sh", ".bat", ".pyc", ".pyd",
)  # fmt: skip
_OWN = ("config.json", "model.safetensors.index.json", "swquant", "model.onnx", "model.onnx.data", "genai_config.json")
_SHOWN = 12


def _companions(source: Path, code: bool) -> Iterator[Path]:
    """The files to copy, in a fixed order, each once."""
    seen: set[Path] = set()
    for pattern in (*COMPANIONS, *CODE) if code else COMPANIONS:
        for path in sorted(source.glob(pattern)):
            suffix = path.suffix.lower()
            if (
                path.is_file()
                and suffix not in (*NEVER, ".safetensors")
                and (code or suffix != ".py")
                and path not in seen
            ):
                seen.add(path)
                yield path


def _allowed(source: Path, path: Path) -> bool:
    """Whether what a path of the folder leads to may be published."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder, target = source.resolve(), path.resolve()
    roots = [folder, Path(HF_HUB_CACHE).resolve()]
    if folder.parent.name == "snapshots":  # a cache that is somewhere else
        roots.append(folder.parent.parent / "blobs")
    return any(target.is_relative_to(root) for root in roots)


def check_readable(source: Path, name: str, *, code: bool) -> None:
    """Raise SwquantError where a file that will be copied cannot be read or used, or is a link out of the folder: known
    before the work, not after it."""
    for path in _companions(source, code):
        if not _allowed(source, path):
            raise SwquantError(
                f"{name}: {path.relative_to(source)} is a link out of the folder, to {shown(path.resolve())}, which is "
                "not copied; put the file itself there, or delete the link"
            )
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise SwquantError(
                f"{name}: {path.relative_to(source)} cannot be read ({error.strerror}); make it readable, or move it away"
            ) from None
        if path.name == GENERATION:
            read_generation(path)
        elif path.suffix.lower() == ".json":
            read_json_value(path)


def copy_companions(source: Path, folder: Path, *, code: bool = False) -> None:
    """Copy what a loader wants beside the weights. code: also Python files, for who trusts them."""
    for path in _companions(source, code):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        if path.name == "tokenizer_config.json" and not code:
            written = read_json(path)
            if (kept := without_lost_code(written)) != written:
                text = json.dumps(kept, indent=2, ensure_ascii=False)
                target.write_text(text + "\n", encoding="utf-8")
                continue
        shutil.copyfile(path, target)


def without_lost_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the classes of `auto_map` whose Python files are not copied: loaders that trust code
    would look for them in vain. Those in a repository of the hub (`OWNER/NAME--module.Class`) stay."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return dict(config)
    kept = {
        key: value
        for key, value in auto_map.items()
        if all(part is None or "--" in str(part) for part in (value if isinstance(value, list | tuple) else [value]))
    }
    return {key: kept if key == "auto_map" else value for key, value in config.items() if key != "auto_map" or kept}


def left_behind(source: Path, read: frozenset[str], *, code: bool) -> str | None:
    """One line that lists what of a folder is neither read nor copied, None where there is nothing. read: names of the
    files that hold the weights. Hidden files and texts about the model are not worth a word."""
    copied = {path.relative_to(source).parts[0] for path in _companions(source, code)}
    lost = sorted(
        path.name + "/" * path.is_dir()
        for path in source.iterdir()
        if path.name not in copied | read | set(_OWN)
        and not path.name.startswith((".", "README"))
        and path.suffix.lower() != ".md"
        and path.name != "__pycache__"
    )
    if not lost:
        return None
    names = ", ".join(shown(name, 60) for name in lost[:_SHOWN])
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    hint = "; --trust-remote-code copies the Python files" if any(name.endswith(".py") for name in lost) else ""
    return f"not copied: {names}{more}{hint}"
