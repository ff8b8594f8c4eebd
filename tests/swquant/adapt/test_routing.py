"""Which set answers: by name, by the input, and none where the input is like no task."""

import random
from pathlib import Path

import pytest
import torch
from support.command_line import Cli, document
from support.tasks import QUICK, file_of, text_of
from transformers import AutoTokenizer

import swquant
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.routing import Key, product, router_of


def tokens(model: Path, text: str, count: int = 96) -> torch.Tensor:
    """The first tokens of a text, as the commands read it."""
    return AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[:, :count]


def test_the_input_chooses_its_set(pool: Path) -> None:
    routed, plain = (swquant.load(pool, task=task, dtype=torch.float32) for task in ("auto", None))
    router = router_of(routed)
    assert router is not None
    with torch.no_grad():
        for task in ("low", "high"):
            ids = tokens(pool, text_of(task, 9))
            laid = swquant.load(pool, task=task, dtype=torch.float32)
            away = [float((model(ids).logits - laid(ids).logits).abs().max()) for model in (routed, plain)]
            assert away[0] < 0.01  # laid weights are rounded to bfloat16, what a router adds is not
            assert away[1] > 0.1
            assert router.chosen == [task]
        both = torch.cat([tokens(pool, text_of(task, 9)) for task in ("high", "low")])
        alone = torch.cat([routed(row[None]).logits for row in both])
        assert torch.allclose(routed(both).logits, alone, atol=1e-5)
        assert router.chosen == ["high", "low"]


def test_what_fits_no_task_is_the_bases(pool: Path) -> None:
    routed, plain = (swquant.load(pool, task=task, dtype=torch.float32) for task in ("auto", None))
    odd = torch.full((1, 96), 101)
    with torch.no_grad():
        assert torch.equal(routed(odd).logits, plain(odd).logits)
    assert router_of(routed).chosen == ["base"]  # type: ignore[union-attr]
    assert router_of(plain) is None


def test_windows_find_their_set(pool: Path) -> None:
    for task in ("low", "high"):
        unseen = text_of(task, 31, words=32 * 20)
        found = swquant.evaluate(pool, unseen, task="auto", window=32)
        assert found.tasks is not None
        assert found.tasks.get(task, 0) >= 0.9 * found.windows
        oracle = swquant.evaluate(pool, unseen, task=task, window=32)
        assert found.perplexity < 1.05 * oracle.perplexity
        assert oracle.tasks is None


def test_generate_goes_on_with_what_was_chosen(cli: Cli, pool: Path) -> None:
    prompt = text_of("high", 3, words=96)
    named, chosen = (
        document(cli("generate", pool, prompt, "--task", task, "--tokens", "8", "--json"))["text"]
        for task in ("high", "auto")
    )
    assert named == chosen
    routed = swquant.load(pool, task="auto", dtype=torch.float32)
    routed.generate(tokens(pool, prompt), max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert router_of(routed).counts == {"high": 1}  # type: ignore[union-attr]


def test_eval_says_who_answered(cli: Cli, pool: Path, tmp_path: Path) -> None:
    text = file_of(tmp_path, "low", 4)
    shown = cli("eval", pool, "--text", text, "--task", "auto", "--window", "32")
    assert "answered by" in shown.out
    assert sum(document(cli("eval", pool, "--text", text, "--task", "auto", "--json"))["tasks"].values()) > 0


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (("--task", "law"), "has no task 'law'; it has low, high, base, and auto chooses"),
        (("--task", "low", "--no-restore"), "leave out one"),
    ],
    ids=str,
)
def test_who_is_not_there_is_said(cli: Cli, pool: Path, typed: tuple[str, ...], problem: str) -> None:
    ran = cli("generate", pool, "t5", *typed)
    assert ran.code == 1
    assert problem in ran.err.splitlines()[-1]


def test_a_checkpoint_without_a_pool_has_no_task(cli: Cli, base: Path) -> None:
    for task in ("auto", "low"):
        assert "has no pool of tasks to choose from" in cli("generate", base, "t5", "--task", task).err
    assert "needs a compressed checkpoint" in cli("generate", base.parent / "original", "t5", "--task", "low").err


def test_a_key_knows_how_far_is_too_far() -> None:
    key = Key(torch.zeros(8), torch.ones(8), 3.0, "a")
    near, far = torch.full((2, 8), 1.0), torch.full((2, 8), 4.0)
    whole, short = torch.tensor([32, 32]), torch.tensor([32, 8])
    assert key.distance(near, whole) == pytest.approx(1)
    assert key.distance(far, whole) > key.limit
    assert key.distance(far, short) == pytest.approx(16 * (1 + 0.25) / 2)  # a short piece may lie farther
    assert key.likelihood(near, whole) > key.likelihood(far, whole)


@pytest.mark.parametrize(("rows", "cols", "side"), [(64, 64, 16), (40, 24, 16), (7, 9, 4)])
def test_blocks_alone_are_the_product_with_what_they_add(rows: int, cols: int, side: int) -> None:
    """Against the dense matrix, where blocks stick out, too."""
    torch.manual_seed(0)
    grid = [(row, col) for row in range(-(-rows // side)) for col in range(-(-cols // side))]
    places = random.Random(1).sample(grid, k=min(4, len(grid)))
    values = torch.randn(len(places), side, side)
    dense = torch.zeros(-(-rows // side) * side, -(-cols // side) * side)
    for (row, col), value in zip(places, values, strict=True):
        dense[row * side : (row + 1) * side, col * side : (col + 1) * side] = value
    to, of = (torch.tensor(item) for item in zip(*places, strict=True))
    x = torch.randn(3, 5, cols)
    assert torch.allclose(product(x, (to, of, values), rows), x @ dense[:rows, :cols].T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma3", "phi3", "mixtral"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Conv1D stores [in, out], OPT flattens its tokens, a mixture has layers that no block lies over."""
    from support.tiny_models import PROMPT, save_model, tiny_model

    original = save_model(tiny_model(architecture), tmp_path / "m")
    base = swquant.compress(original, tmp_path / "c", prompt=PROMPT, block="32").path
    tasks = {task: file_of(tmp_path, task) for task in ("low", "high")}
    result = swquant.adapt(base, tmp_path / "out", tasks, **QUICK)
    assert swquant.verify(tmp_path / "out", loads=True) == []
    routed = swquant.load(tmp_path / "out", task="auto", dtype=torch.float32)
    both = torch.cat([tokens(tmp_path / "out", text_of(task, 9)) for task in tasks])
    with torch.no_grad():
        got = routed(both).logits
        for row, task in enumerate(router_of(routed).chosen):  # type: ignore[union-attr]
            laid = swquant.load(tmp_path / "out", task=task, dtype=torch.float32)
            assert torch.allclose(got[row], laid(both[row : row + 1]).logits[0], atol=1e-4)
    assert set(result.sets) == set(tasks)


def test_nothing_of_a_set_is_read_before_it_is_chosen(pool: Path) -> None:
    with CompressedCheckpoint(pool, task="auto") as checkpoint:
        from swquant.models.loading import running_model

        model = running_model(checkpoint, torch.float32)
    router = router_of(model)
    assert router is not None
    assert router._laid == {}
    with torch.no_grad():
        model(tokens(pool, text_of("low", 2)))
    assert list(router._laid) == ["low"]
