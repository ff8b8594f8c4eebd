"""`push`: published by huggingface_hub's own client to a small hub over HTTP, fetched again by it, and refused."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from support.command_line import Cli, document, one_line
from support.hub import Hub, running_hub
from support.tiny_models import Planted, sample_text

import swquant
from exporters.errors import SwquantError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client may talk, with a token, and caches in a folder of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, online: None) -> Iterator[Hub]:
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.url)
        yield running


def test_what_is_published_is_the_folder(cli: Cli, hub: Hub, compressed: Path) -> None:
    ran = cli("push", compressed, "me/tiny", "--private")
    assert (ran.code, hub.private) == (0, {"me/tiny": True})
    assert hub.repositories["me/tiny"] == contents(compressed)
    assert f"{len(contents(compressed))} files, " in ran.out
    assert f"{hub.url}/me/tiny/commit/" in ran.out


def test_an_older_checkpoint_does_not_stay(hub: Hub, compressed: Path) -> None:
    hub.repositories["me/tiny"] = {
        "model-00002-of-00002.safetensors": b"old",
        "swquant/old.json": b"old",
        "picture.png": b"mine",
        "README.md": b"old",
    }
    pushed = swquant.push(compressed, "me/tiny")
    assert hub.repositories["me/tiny"] == {**contents(compressed), "picture.png": b"mine"}
    assert dict(pushed.files) == {name: len(data) for name, data in contents(compressed).items()}


def test_patches_alone_are_published_beside_what_is_there(hub: Hub, bf16_llama: Planted, tmp_path: Path) -> None:
    options: Any = {"budget": "2%", "block": 16, "steps": 1, "window": 16, "warmup": 1, "lr": "1e-3", "batch": 1}
    swquant.tune(bf16_llama.folder, tmp_path / "patches", text=sample_text(16 * 16), **options)
    hub.repositories["me/patches"] = {"model.safetensors": b"the model itself", "swquant/old.json": b"old"}
    swquant.push(tmp_path / "patches", "me/patches")
    assert hub.repositories["me/patches"] == {
        **contents(tmp_path / "patches"),
        "model.safetensors": b"the model itself",
    }
    here, there = (swquant.load(name, base=bf16_llama.folder) for name in (tmp_path / "patches", "me/patches"))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(here.parameters(), there.parameters(), strict=True))
    (tmp_path / "patches/swquant/outliers.safetensors").write_bytes(b"")
    with pytest.raises(SwquantError, match="does not verify"):
        swquant.push(tmp_path / "patches", "me/patches", dry_run=True)


def test_what_was_published_can_be_loaded_by_its_name(hub: Hub, compressed: Path) -> None:
    swquant.push(compressed, "me/tiny")
    here, there = swquant.load(compressed).state_dict(), swquant.load("me/tiny").state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_dry_run_asks_nobody(cli: Cli, hub: Hub, compressed: Path) -> None:
    shown = document(cli("push", compressed, "me/tiny", "--dry-run", "--json"))
    assert shown == {
        "repository": "me/tiny",
        "files": {name: len(data) for name, data in sorted(contents(compressed).items())},
        "url": None,
    }
    assert "would be sent to me/tiny; nothing was" in cli("push", compressed, "me/tiny", "--dry-run").out
    assert hub.asked == []


def test_what_does_not_verify_stays_here(cli: Cli, hub: Hub, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "out"))
    (folder / "notes.txt").write_text("x")
    ran = cli("push", folder, "me/tiny")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == (
        f"error: {folder}: does not verify (notes.txt: there, but not listed in the manifest); nothing was sent"
    )
    assert hub.repositories == {}


def test_a_rewritten_card_is_published_as_it_is(hub: Hub, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "out"))
    card = ModelCard((folder / "README.md").read_text())
    card.data.base_model = "me/original"
    card.save(folder / "README.md")
    swquant.push(folder, "me/tiny")
    assert b"base_model: me/original" in hub.repositories["me/tiny"]["README.md"]


@pytest.mark.parametrize(
    "name", ["tiny", "me/tiny/more", "../tiny", "me/ti ny", "", "me/a--b", "-/x", "me/..", "https://x/y"]
)
def test_what_is_no_repository_is_refused_before_anything(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(SwquantError, match="give OWNER/NAME, as on the hub$"):
        swquant.push(tmp_path / "nowhere", name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "log in again (hf auth login) with a token that may write"),
        (403, "give a repository of your own"),
        (418, "nothing was published; try again, or see what it says"),
    ],
)
def test_a_hub_that_refuses_is_one_line(cli: Cli, hub: Hub, compressed: Path, status: int, remedy: str) -> None:
    hub.refusal = (status, "no \x1b[2J way")
    ran = cli("push", compressed, "me/tiny")
    assert ran.code == 1
    line = ran.err.splitlines()[-1]
    assert line.startswith("error: me/tiny: the hub refused (")
    assert line.endswith(remedy)
    assert "\x1b" not in line


def test_a_hub_that_is_not_there_is_one_line(
    cli: Cli, online: None, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    ran = cli("push", compressed, "me/tiny")
    assert ran.code == 1
    line = ran.err.splitlines()[-1]
    assert line.startswith("error: me/tiny: the hub cannot be reached (")
    assert line.endswith("; check the network (HF_ENDPOINT, proxies), then push again")


def test_nobody_logged_in_and_offline_are_said(
    online: None, compressed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SwquantError, match="^me/tiny: nobody is logged in to the hub; run hf auth login"):
        swquant.push(compressed, "me/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SwquantError, match="^me/tiny: HF_HUB_OFFLINE forbids the network"):
        swquant.push(compressed, "me/tiny")


def test_no_checkpoint_is_no_checkpoint(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    assert "no swquant/manifest.json" in one_line(cli("push", tmp_path, "me/tiny"))
    assert hub.asked == []
