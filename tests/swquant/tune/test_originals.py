"""`tune` of a model that is not compressed: patches alone, bound to it, or the whole model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.command_line import Cli, document, one_line
from support.tiny_models import TOKENS, sample_text, save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from exporters.errors import SwquantError
from exporters.sidecar import SIDECAR
from swquant.checkpoints.manifest import MANIFEST, write_manifest
from swquant.checkpoints.origin import CARD

QUICK: dict[str, Any] = {"budget": "5%", "block": 16, "steps": 12, "window": 32, "warmup": 2, "lr": "3e-3", "batch": 4}
TEXT = sample_text(32 * 24)
SEAL = (
    "format",
    "version",
    "digest",
)  # of a manifest: written anew, so that only a look at the records finds what is wrong


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in bfloat16. Do not change it."""
    return save_model(
        tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("o") / "original", torch.bfloat16
    )


@pytest.fixture(scope="module")
def patches(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tune wrote of it. Do not change it."""
    result = swquant.tune(original, tmp_path_factory.mktemp("p") / "patches", text=TEXT, eval_text=TEXT, **QUICK)
    assert result is not None
    before, after = result.evaluation["perplexity"]
    assert after < 0.95 * before
    return result.path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_patches_alone_are_small_and_load_over_their_base(original: Path, patches: Path) -> None:
    names = {path.relative_to(patches).as_posix() for path in patches.rglob("*") if path.is_file()}
    assert names == {MANIFEST, SIDECAR, CARD}
    record = json.loads((patches / MANIFEST).read_text())
    tuned = record["tuned"]["tuned"]
    assert record["source"]["name"] == "original"
    assert tuned["blocks"] == sum(item["blocks"]["tuned"] for item in record["tensors"].values())
    assert (patches / SIDECAR).stat().st_size < 1.2 * tuned["bytes"]
    loaded = swquant.load(patches, base=original, dtype=torch.float32)
    assert not torch.allclose(logits(loaded), logits(swquant.load(original, dtype=torch.float32)), atol=0.05)
    for name, item in record["tensors"].items():
        side = tuned["options"]["block"]
        was, now = (
            dict(swquant.load(path, base=base).named_parameters())[name]
            for path, base in ((original, None), (patches, original))
        )
        changed = (was != now).float()
        grid = changed.unflatten(0, (-1, side)).unflatten(2, (-1, side)).amax(dim=(1, 3))
        assert int(grid.sum()) == item["blocks"]["tuned"]


def test_merged_it_is_an_ordinary_folder(cli: Cli, original: Path, patches: Path, tmp_path: Path) -> None:
    ran = cli("merge", patches, tmp_path / "whole", "--base", original)
    assert ran.code == 0, ran.err
    assert "the whole model" in " ".join(ran.out.split())
    assert swquant.verify(tmp_path / "whole") == []
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert stock.dtype is torch.bfloat16
    assert torch.equal(logits(stock), logits(swquant.load(patches, base=original)))
    old, new = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "whole"))
    touched = json.loads((patches / MANIFEST).read_text())["tensors"]
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(touched)
    assert json.loads((tmp_path / "whole/swquant/tuned.json").read_text())["source"]["name"] == "original"


def test_the_whole_model_at_once_is_the_same(cli: Cli, original: Path, patches: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    typed = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
    shown = document(cli("tune", original, tmp_path / "out", "--text", tmp_path / "text", *typed, "--merge", "--json"))
    assert shown["manifest"] is None
    assert shown["record"]["blocks"] > 0
    swquant.merge(patches, tmp_path / "merged", base=original)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "merged"))
    assert all(torch.equal(one[name], other[name]) for name in {**one, **other})


def test_another_base_is_refused_though_its_headers_are_the_same(
    cli: Cli, original: Path, patches: Path, tmp_path: Path
) -> None:
    shutil.copytree(original, tmp_path / "other")
    weights = load_file(original / "model.safetensors")
    touched = next(iter(json.loads((patches / MANIFEST).read_text())["tensors"]))
    weights[touched][0, 0] += 1
    save_file(weights, tmp_path / "other/model.safetensors", {"format": "pt"})
    with pytest.raises(SwquantError, match=f"its patches belong to original, and {touched} of other is another"):
        swquant.load(patches, base=tmp_path / "other")
    ran = cli("merge", patches, tmp_path / "out", "--base", tmp_path / "other")
    assert (ran.code, (tmp_path / "out").exists()) == (1, False)
    smaller = save_model(tiny_model("llama", num_hidden_layers=1), tmp_path / "smaller")
    with pytest.raises(SwquantError, match="name the model that was tuned"):
        swquant.load(patches, base=smaller)


def test_patches_alone_are_no_model(cli: Cli, original: Path, patches: Path, tmp_path: Path) -> None:
    for typed in (
        ("generate", patches, "t5"),
        ("merge", patches, tmp_path / "out"),
        ("compress", patches, tmp_path / "out"),
    ):
        ran = cli(*typed)
        assert ran.code == 1, typed
        assert "holds patches alone; name their model, original, with --base MODEL" in " ".join(ran.err.split())
    with pytest.raises(SwquantError, match="is a model by itself, which has no base"):
        swquant.load(original, base=original)


def test_verify_and_inspect_know_them(cli: Cli, patches: Path, tmp_path: Path) -> None:
    manifest = swquant.inspect(patches)
    ran = cli("verify", patches)
    assert (ran.code, ran.err) == (0, "")
    assert "2 files, " in ran.out
    shown = cli("inspect", patches).out
    for word in ("for original (safetensors, fingerprint ", "Blocks of the set tuned", "held-out loss", "--base MODEL"):
        assert word in " ".join(shown.split())
    assert manifest["source"]["fingerprint"][:12] in shown
    assert document(cli("inspect", patches, "--json")) == manifest
    card = ModelCard((patches / CARD).read_text())
    assert (card.data.base_model, card.data.tags) == (None, ["swquant", "patches"])
    assert 'swquant.load("PATH", base="MODEL")' in card.text
    assert "leave out --loads" in one_line(cli("verify", patches, "--loads"))
    folder = Path(shutil.copytree(patches, tmp_path / "broken"))
    (folder / "more.safetensors").write_bytes((folder / SIDECAR).read_bytes())
    (folder / CARD).write_text("in other words")
    assert swquant.verify(folder) == ["more.safetensors: there, but not listed in the manifest"]
    (folder / SIDECAR).unlink()
    assert f"{SIDECAR}: listed in the manifest, but not there" in swquant.verify(folder)


def test_what_the_records_say_is_held_against_the_blocks(patches: Path, tmp_path: Path) -> None:
    manifest: Any = swquant.inspect(patches)
    name = next(iter(manifest["tensors"]))
    for key, value, problem in (
        ("blocks", {"tuned": 99}, "does not hold the tuned that the manifest counts"),
        ("shape", [16, 16], name),
        ("shape", [64], "is no matrix of the manifest"),
    ):
        folder = Path(shutil.copytree(patches, tmp_path / f"{key}{len(value)}", dirs_exist_ok=True))
        changed = {**manifest, "tensors": {**manifest["tensors"], name: {**manifest["tensors"][name], key: value}}}
        write_manifest(folder, {key: value for key, value in changed.items() if key not in SEAL})  # type: ignore[misc]
        assert [said for said in swquant.verify(folder) if problem in said], (key, swquant.verify(folder))
    folder = Path(shutil.copytree(patches, tmp_path / "unlisted"))
    write_manifest(folder, {**{key: manifest[key] for key in manifest if key not in SEAL}, "files": {}})  # type: ignore[misc]
    assert f"{SIDECAR}: holds patches that the manifest counts, but is not listed in it" in swquant.verify(folder)


def test_they_are_run_over_their_base(cli: Cli, original: Path, patches: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    folder, words = Path(shutil.copytree(patches, tmp_path / "p")), ("--base", original)
    typed = ("eval", folder, "--text", tmp_path / "text", "--against", original)
    shown = document(cli(*typed, *words, "--json"))
    assert shown["perplexity"] < 0.95 * shown["original_perplexity"]
    assert cli(*typed, *words, "--card").code == 0
    assert f"{shown['perplexity']:.4f}" in (folder / CARD).read_text()
    assert swquant.verify(folder) == []
    said = document(cli("generate", patches, "t5 t9", *words, "--tokens", 4, "--json"))["text"]
    swquant.merge(patches, tmp_path / "whole", base=original)
    assert said == swquant.generate(tmp_path / "whole", "t5 t9", tokens=4)
    assert "leave out --no-restore" in one_line(cli("generate", patches, "t5", *words, "--no-restore"))
    assert "leave out --task notes" in one_line(cli("generate", patches, "t5", *words, "--task", "notes"))
    assert "leave out --base" in one_line(cli("generate", original, "t5", *words))


def test_what_is_made_of_checkpoints_is_not_made_of_patches(cli: Cli, patches: Path, tmp_path: Path) -> None:
    for typed in (
        ("export", patches, tmp_path / "out"),
        ("tune", patches, tmp_path / "out"),
        ("detect", patches),
        ("adapt", patches, tmp_path / "out", "--task", f"a={patches / CARD}"),
    ):
        assert "holds patches alone; " in one_line(cli(*typed)), typed
    ran = cli("compress", patches, tmp_path / "out", "--like", patches)
    assert "--like" in ran.err
    assert "holds patches alone, which compress did not make" in ran.err


def test_overwrite_replaces_them_and_nothing_else(cli: Cli, original: Path, patches: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    out = Path(shutil.copytree(patches, tmp_path / "out"))
    typed = [word for key, value in (QUICK | {"steps": 1}).items() for word in (f"--{key}", value)]
    words = ("tune", original, out, "--text", tmp_path / "text", *typed)
    assert "exists already; give another OUT, or --overwrite to replace it" in one_line(cli(*words))
    assert "leave out --set and --points" in one_line(cli("merge", patches, out, "--base", original, "--points"))
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt, which swquant did not put there" in one_line(cli(*words, "--overwrite"))
    (out / "notes.txt").unlink()
    ran = cli(*words, "--overwrite")
    assert ran.code == 0, ran.err
    assert json.loads((out / MANIFEST).read_text())["tuned"]["tuned"]["options"]["steps"] == 1
    (out / MANIFEST).write_text("{}")
    assert f"its {MANIFEST} cannot be relied on (see swquant verify); move it away" in one_line(
        cli(*words, "--overwrite")
    )


def test_damage_is_found(original: Path, patches: Path, tmp_path: Path) -> None:
    for name, change, problem in (
        (
            SIDECAR,
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "is not what was written, its sha256 says; fetch it again$",
        ),
        (MANIFEST, lambda data: data.replace(b'"version": 1', b'"version": 2'), "version"),
        (MANIFEST, lambda data: data.replace(b'"sha256"', b'"sha257"', 1), "the digest does not match"),
        (MANIFEST, lambda data: b"{", "not JSON|damaged"),
    ):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(patches, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        with pytest.raises(SwquantError, match=problem):
            swquant.load(folder, base=original)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "mixtral"])
def test_architectures(architecture: str, tmp_path: Path) -> None:
    """Conv1D, tied heads, experts beside."""
    original = save_model(tiny_model(architecture, num_hidden_layers=2), tmp_path / "m", torch.bfloat16)
    result = swquant.tune(original, tmp_path / "p", text=TEXT, **{**QUICK, "budget": "2%"})
    assert result is not None
    swquant.merge(tmp_path / "p", tmp_path / "whole", base=original)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(stock), logits(swquant.load(tmp_path / "p", base=original)))
    assert result.record["held_out_after"] < result.record["held_out_before"]


@pytest.mark.slow
def test_a_gguf_file_is_tuned_too(tmp_path: Path) -> None:
    from support.gguf_models import save_gguf_model

    save_gguf_model("llama", tmp_path / "hf", torch.float16)
    swquant.compress(tmp_path / "hf", tmp_path / "m.gguf", prompt="t5 t9", format="gguf", allow_dense=True)
    result = swquant.tune(tmp_path / "m.gguf", tmp_path / "p", text=TEXT, **QUICK)
    assert result is not None
    swquant.merge(tmp_path / "p", tmp_path / "whole", base=tmp_path / "m.gguf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    loaded = swquant.load(tmp_path / "p", base=tmp_path / "m.gguf", dtype=stock.dtype)
    assert torch.allclose(logits(stock).float(), logits(loaded).float(), atol=0.05)
