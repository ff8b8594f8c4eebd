"""What the prompt does not reach, or swquant cannot watch, is named as not looked at; never "none found"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import every_architecture
from support.command_line import Cli

import swquant
from calibrationless import watcher
from exporters.errors import SwquantError
from swquant.detect.record import detection_record


def saved(model_type: str, folder: Path) -> Path:
    return every_architecture.save(every_architecture.build(model_type, torch.float32), folder / model_type)


def test_weights_that_the_prompt_does_not_reach_are_listed(tmp_path: Path, cli: Cli) -> None:
    folder = saved("bart", tmp_path)
    found = swquant.detect(folder)
    assert found.unseen
    assert all(".encoder_attn." in name for name in found.unseen)
    assert detection_record(found)["unseen"] == list(found.unseen)
    out = cli("detect", folder).out
    assert f"Not looked at: {found.unseen[0]} and {len(found.unseen) - 1} more" in " ".join(out.split())


def test_a_model_of_which_no_down_projection_was_seen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="swquant saw no product of a down projection"):
        swquant.detect(saved("dbrx", tmp_path))


def test_a_model_that_wants_more_than_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="does not run on text alone"):
        swquant.detect(saved("udop", tmp_path))


def test_experts_are_seen_one_by_one_where_all_are_multiplied_at_once(tmp_path: Path) -> None:
    found = swquant.detect(saved("llama4_text", tmp_path))
    experts = [watch for watch in found.architecture.watches if watch.expert is not None]
    assert {watch.module for watch in experts} == {
        watch.module for watch in experts if watch.name in found.probe.linears and watch.down
    }
    assert found.unseen == found.unseen_layers == ()
    assert not {"unseen", "unseen_layers"} & detection_record(found).keys()


def test_a_projection_that_was_not_seen_through_any_expert_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {function: product for function, product in watcher._PRODUCTS.items() if function is not torch.bmm}
    monkeypatch.setattr(watcher, "_PRODUCTS", known)
    found = swquant.detect(saved("llama4_text", tmp_path))
    experts = {weight.name for weight in found.architecture.weights.values() if ".experts." in weight.module + "."}
    assert set(found.unseen) == experts != set()


def test_a_layer_without_a_down_projection_that_was_seen_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    keep = watcher.Watcher._keep

    def blind_in_layer_2(self: watcher.Watcher, watch: watcher.Watch, *seen: object) -> None:
        if not (watch.down and ".2." in watch.name):
            keep(self, watch, *seen)  # type: ignore[arg-type]

    monkeypatch.setattr(watcher.Watcher, "_keep", blind_in_layer_2)
    folder = saved("llama", tmp_path)
    found = swquant.detect(folder)
    assert found.unseen_layers == (2,)
    assert detection_record(found)["unseen_layers"] == [2]
    assert "Not looked at: layer 2" in cli("detect", folder).out
