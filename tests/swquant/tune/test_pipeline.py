"""`tune`, from end to end on a tiny model: it recovers, goes on after interruptions, and refuses what cannot be."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, document
from support.tiny_models import PROMPT, Planted, sample_text, save_model, tiny_model

import swquant
from exporters.sidecar import SIDECAR
from swquant.detect.own_text import write_text
from swquant.progress import Progress
from swquant.training import data, loop
from swquant.training.losses import divergence
from swquant.tune.session import Session

Pair = tuple[Path, Path]
QUICK: dict[str, Any] = {
    "budget": "1bits",
    "block": 16,
    "steps": 12,
    "window": 64,
    "texts": 12,
    "warmup": 2,
    "lr": "3e-3",
}


def words(**changes: Any) -> list[str]:
    return [word for key, value in {**QUICK, **changes}.items() for word in (f"--{key}", str(value))]


def distance(original: Path, folder: Path) -> float:
    """KL of a checkpoint as it is loaded, on text that the original wrote and nobody saw."""
    teacher, student = (swquant.load(path, dtype=torch.float32) for path in (original, folder))
    unseen = write_text(teacher, None, 99, Progress(), texts=4, length=64)
    with torch.no_grad():
        return float(divergence(student(unseen).logits, teacher(unseen).logits, torch.ones(4, 64, dtype=torch.bool)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_recovery_without_data(pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    longer = {**QUICK, "steps": 30, "batch": 8, "texts": 160}  # 10,000 tokens: fewer would be learned by heart
    result = swquant.tune(checkpoint, tmp_path / "out", against=original, **longer)
    assert result is not None
    record = result.manifest["tuned"]["tuned"]
    assert record["held_out_after"] < 0.8 * record["held_out_before"]
    assert record["data"] == "own text"
    assert record["against"]["name"] == "original"
    assert (record["rate"], record["tried"]) == (0.003, {})
    assert len(record["losses"]) == 30
    assert record["tokens"] == 30 * 8 * 63
    assert distance(original, tmp_path / "out") < 0.8 * distance(original, checkpoint)
    assert swquant.verify(tmp_path / "out", loads=True) == []
    assert not (tmp_path / "out.tuning").exists()
    old, new = files(checkpoint), files(tmp_path / "out")
    assert {name for name in new if new[name] != old.get(name)} == {
        SIDECAR,
        "README.md",
        "swquant/manifest.json",
        "swquant/report.html",
    }
    page = new["swquant/report.html"].decode()
    for part in ("What was trained: tuned", "tuned-losses", "Chosen blocks by layer", "Chosen blocks by kind of layer"):
        assert page.count(part) >= 1
    assert page.startswith(old["swquant/report.html"].decode().removesuffix("\n</main>\n</body>\n</html>\n"))
    counted = sum(item["blocks"]["tuned"] for item in result.manifest["tensors"].values() if "blocks" in item)
    assert counted == record["blocks"]
    assert record["bytes"] <= 0.125 * result.manifest["totals"]["quantized_weights"]


@pytest.mark.parametrize(
    "select", ["gradient", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fisher", "random", "diagonal"))]
)
def test_blocks_can_be_chosen_otherwise(pair: Pair, tmp_path: Path, select: str) -> None:
    original, checkpoint = pair
    result = swquant.tune(checkpoint, tmp_path / "out", against=original, select=select, from_="attention", **QUICK)
    assert result is not None
    assert all("attn" in name for name, item in result.manifest["tensors"].items() if "blocks" in item)
    record = result.manifest["tuned"]["tuned"]
    assert record["held_out_after"] < record["held_out_before"]


def test_a_text_alone_is_learned(pair: Pair, tmp_path: Path) -> None:
    _, checkpoint = pair
    text = sample_text(64 * 12)
    result = swquant.tune(checkpoint, tmp_path / "out", text=text, text_name="words", eval_text=text, **QUICK)
    assert result is not None
    before, after = result.evaluation["perplexity"]
    assert after < 0.9 * before
    record = result.manifest["tuned"]["tuned"]
    assert (record["data"], record["against"]) == ("words", None)


def test_responses_are_learned(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    _, checkpoint = pair
    lines = [{"prompt": f"t{number} t{number + 1}", "response": "t77 t78 "} for number in range(2, 40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    typed = ["tune", checkpoint, tmp_path / "out", "--data", tmp_path / "train.jsonl", *words(batch=8)]
    manifest = document(cli(*typed, "--json"))["manifest"]
    record = manifest["tuned"]["tuned"]
    assert record["held_out_after"] < 0.9 * record["held_out_before"]
    assert record["tokens"] == 12 * 8 * 3  # two words, and the token that ends them
    assert record["data"] == "train.jsonl"


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("text", marks=pytest.mark.slow),
        pytest.param("choice", marks=pytest.mark.slow),
        pytest.param("look", marks=pytest.mark.slow),
        "step 7",
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    original, checkpoint = pair
    options = {**QUICK, "lr": "auto"} if stage == "look" else QUICK
    swquant.tune(checkpoint, tmp_path / "whole", against=original, **options)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, stage)
        with pytest.raises(KeyboardInterrupt):
            swquant.tune(checkpoint, tmp_path / "out", against=original, **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.tuning").exists() == (stage != "text")
    swquant.tune(checkpoint, tmp_path / "out", against=original, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.tuning").exists()


def _interrupt_at(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Let SIGINT arrive once, when a stage has begun."""
    from swquant.training import rates
    from swquant.tune import pipeline

    def raising(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    if stage.startswith("step"):
        at, loss = int(stage.split()[1]), Session.loss_of
        patch.setattr(Session, "loss_of", lambda self, step, part: raising() if step == at else loss(self, step, part))
    else:
        where = {"text": (data, "write_text"), "choice": (pipeline, "scores"), "look": (rates, "look")}
        patch.setattr(*where[stage], raising)


def test_what_was_done_is_not_done_again(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, checkpoint = pair
    seen: list[int] = []
    loss = Session.loss_of
    with monkeypatch.context() as patch:
        _interrupt_at(patch, "step 9")
        with pytest.raises(KeyboardInterrupt):
            swquant.tune(checkpoint, tmp_path / "out", against=original, **QUICK)
    monkeypatch.setattr(Session, "loss_of", lambda self, step, part: seen.append(step) or loss(self, step, part))
    from swquant.training import rates
    from swquant.tune import pipeline

    for module, name in ((data, "write_text"), (pipeline, "scores"), (rates, "look")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("again"))
    swquant.tune(checkpoint, tmp_path / "out", against=original, **QUICK)
    assert seen == [9, 10, 11]


def test_a_loss_that_is_no_number_stops_it(
    cli: Cli, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, checkpoint = pair
    loss = Session.loss_of
    monkeypatch.setattr(
        Session, "loss_of", lambda self, step, part: loss(self, step, part) * (float("nan") if step == 3 else 1)
    )
    ran = cli("tune", checkpoint, tmp_path / "out", "--against", original, *words())
    assert ran.code == 1
    assert "loss of step 4 is NaN or infinite at a learning rate of 0.003; lower it" in ran.err
    assert not (tmp_path / "out").exists()
    assert loop.State.at(tmp_path / "out.tuning", "").saved.step == 0  # of another result, and readable


def test_a_dry_run_says_what_would_be_done(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    typed = ["tune", checkpoint, tmp_path / "out", "--against", original, *words(), "--dry-run"]
    plan = document(cli(*typed, "--json"))
    assert plan["select"] == "recovery"
    assert plan["blocks"] * 16 * 16 == plan["parameters"]
    assert plan["bytes"] == plan["blocks"] * (2 * 256 + 8)
    assert plan["more_bits_per_quantized_weight"] <= 1
    assert plan["tokens"] == 12 * 2 * 64
    assert plan["candidates"] == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 3
    )
    ran = cli(*typed)
    assert f"{plan['blocks']:,} of {plan['of_blocks']:,} blocks of 16 x 16 on c" in ran.out
    assert [*tmp_path.iterdir()] == []


def test_what_was_written_and_what_inspect_shows(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    (tmp_path / "text").write_text(sample_text(150))
    ran = cli(
        "tune", checkpoint, tmp_path / "out", "--against", original, *words(lr="auto"), "--eval-text", tmp_path / "text"
    )
    assert ran.code == 0, ran.err
    record = swquant.inspect(tmp_path / "out")["tuned"]["tuned"]
    assert 3 <= len(record["tried"]) <= 6
    assert record["tried"][f"{record['rate']:g}"] == min(loss for loss in record["tried"].values() if loss is not None)
    for part in ("Rates by held-out loss:", "was taken", "Held-out loss", "perplexity", "Blocks of the set tuned"):
        assert part in " ".join(ran.out.split())
    shown = cli("inspect", tmp_path / "out").out
    assert "Blocks of the set tuned" in shown
    assert "outliers and blocks" in shown
    second = cli("tune", tmp_path / "out", tmp_path / "two", "--against", original, *words(steps=2))
    assert second.code == 0, second.err
    assert "Blocks of the set tuned-2" in second.out


def refused(cli: Cli, tmp_path: Path, *typed: Any) -> str:
    """The one line of a command that wrote nothing."""
    ran = cli("tune", *typed)
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert not (tmp_path / "out").exists()
    return ran.err


def test_what_cannot_be_is_one_line_before_any_work(cli: Cli, pair: Pair, bf16_llama: Planted, tmp_path: Path) -> None:
    original, checkpoint = pair
    out, against = tmp_path / "out", ("--against", original)
    (tmp_path / "short").write_text("t2 t3 t4")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "t2", "response": "t3"}\n{')
    other = save_model(tiny_model("llama", vocab_size=96), tmp_path / "other")
    small = ("--block", 16)
    for typed, problem in {
        (original, out, *against, "--train", "scales"): "original is not compressed and has no scales; train blocks",
        (original, out, *against, "--select", "recovery"): "in original nothing was rounded; take gradient",
        (checkpoint, out, *against, "--merge"): "c is compressed; tune it, then swquant merge bakes",
        (checkpoint, out): "nothing to learn from; name the original with --against",
        (checkpoint, out, *against, "--budget", "100"): "--budget 100 holds no block of 64 x 64 (8,200 bytes)",
        (checkpoint, out, *against, "--budget", "much"): "is not understood",
        (checkpoint, out, "--text", tmp_path / "short", *small): "3 tokens are less than two windows",
        (checkpoint, out, "--text", tmp_path / "none"): "cannot be read",
        (checkpoint, out, "--data", tmp_path / "broken.jsonl", *small, "--window", 64): "line 2 is not JSON",
        (checkpoint, out, "--data", tmp_path / "none", *small, "--window", 64): "cannot be read",
        (checkpoint, out, "--against", other, *small): "have different vocabularies (128 and 96 tokens)",
        (checkpoint, out, "--text", tmp_path / "short", "--data", tmp_path / "broken.jsonl"): "two texts to train on",
        (checkpoint, checkpoint, *against, "--budget", "1bits", *small): "holds the source",
        (checkpoint, tmp_path / "short", *against, "--budget", "1bits", *small): "exists already",
        (
            checkpoint,
            out,
            "--text",
            tmp_path / "broken.jsonl",
            "--select",
            "recovery",
            *small,
            "--window",
            2,
        ): "--against",
    }.items():
        assert problem in refused(cli, tmp_path, *typed), typed
    assert not (tmp_path / "out.tuning").exists()


def test_rounded_activations_are_refused(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, _ = pair
    swquant.compress(original, tmp_path / "w8a8", prompt=PROMPT, bits=8, activations="int8")
    ran = cli("tune", tmp_path / "w8a8", tmp_path / "out", "--against", original, *words())
    assert "which has no gradient" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_mixture_tunes_what_is_no_expert(tmp_path: Path) -> None:
    original = save_model(tiny_model("mixtral", num_hidden_layers=2), tmp_path / "m")
    swquant.compress(original, tmp_path / "c", prompt=PROMPT, block="32", bits=3)
    plans = []
    result = swquant.tune(
        tmp_path / "c", tmp_path / "out", against=original, on_plan=plans.append, **{**QUICK, "budget": "0.1bits"}
    )
    assert result is not None
    assert len(plans[0].left_out) == 2 * 4 * 3
    assert all("self_attn" in name for name, item in result.manifest["tensors"].items() if "blocks" in item)
