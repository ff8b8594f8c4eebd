"""The architecture of mixtures: against plain loops, against a dense reference with gradients, saved and loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import TOKENS, save_model, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from swquant.pr_moe import Mixture, PrMoeConfig, PrMoeForCausalLM, mixtures_of, narrowed, parts_of, register


class Plain(nn.Module):
    def __init__(self, hidden: int = 6, neurons: int = 10) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, neurons)
        self.down = nn.Linear(neurons, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def mixture(top: int, *, residual: bool = True, experts: int = 3, capacity: float | None = None) -> Mixture:
    torch.manual_seed(top)
    config = PrMoeConfig(None, top=top, residual=residual, capacity=capacity)
    made = Mixture(Plain(), "down", experts, 4, config).double().train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    made.gate.weight.data *= 3
    return made


def reference(made: Mixture, x: Tensor) -> Tensor:
    """The formula, token by token, all experts computed."""
    rows = []
    for row in x:
        gates = torch.softmax(made.gate.weight.float() @ row.float(), dim=0)
        best = sorted(range(len(gates)), key=lambda expert: -float(gates[expert]))[: made.top]
        total = sum(gates[expert] for expert in best)
        total = total.detach() if made.top == 1 else total
        y = sum((gates[expert] / total) * made.experts[expert](row) for expert in best)
        if made.mlp is not None:
            c = torch.softmax(made.coefficient.weight.float() @ row.float() + made.coefficient.bias.float(), dim=0)
            y = c[0] * made.mlp(row) + c[1] * y
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("top", [1, 2])
def test_a_mixture_and_its_gradients_are_those_of_the_formula(top: int, residual: bool) -> None:
    made = mixture(top, residual=residual)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 6, dtype=torch.float64)
    got = made(x)
    expected = reference(made, x.reshape(-1, 6)).reshape(2, 7, 6)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # gates are float32
    wanted = [x, *made.parameters()]
    ours = torch.autograd.grad((got * weight).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, atol=1e-4, rtol=1e-4)  # fmt: skip
    gate = ours[[*dict(made.named_parameters())].index("gate.weight") + 1]
    assert gate is not None
    assert gate.abs().max() > 0  # of a single expert, too


@pytest.mark.parametrize(("top", "capacity"), [(1, 1.0), (2, 1.0), (2, 0.5), (1, 0.3)])
def test_balance_and_capacity_are_those_of_a_plain_loop(top: int, capacity: float) -> None:
    made = mixture(top, capacity=capacity)
    made.recorded = True
    x = torch.randn(11, 6, dtype=torch.float64)
    got = made(x)
    gates = torch.softmax(x.float() @ made.gate.weight.float().T, dim=-1)
    places, taken, dropped = math.ceil(capacity * 11 * top / 3), [0, 0, 0], set()
    order = gates.argsort(dim=-1, descending=True)[:, :top]
    for choice in range(top):
        for token in range(11):
            expert = int(order[token, choice])
            if taken[expert] >= places:
                dropped.add((token, expert))
            taken[expert] += 1
    assert made.dropped == len(dropped)
    assert made.routed is not None
    assert made.routed.tolist() == taken
    share = [float((order[:, 0] == expert).float().mean()) for expert in range(3)]
    balance = 3 * sum(float(gates[:, expert].mean()) * share[expert] for expert in range(3))
    assert made.used is not None
    mean, often = made.used
    assert float(3 * (mean * often).sum()) == pytest.approx(balance, rel=1e-5)
    made.eval()
    whole = {token for token in range(11) if not any(out == token for out, _ in dropped)}
    same = (made(x) - got).abs().amax(dim=-1) < 1e-9
    assert whole <= {token for token in range(11) if same[token]} < {*range(11)}  # only training drops tokens


def test_an_exported_graph_computes_the_same() -> None:
    made = mixture(2).float().eval()
    x = torch.randn(9, 6)
    graph = torch.export.export(made, (x,))
    torch.testing.assert_close(graph.module()(x), made(x), atol=1e-5, rtol=1e-5)


def test_an_mlp_is_known_by_its_shapes() -> None:
    mlp = Plain()
    assert parts_of(mlp, "down") == {"up": 1, "down": 0}
    small = narrowed(mlp, "down", 3)
    assert {name: tuple(value.shape) for name, value in small.named_parameters()} == {
        "up.weight": (3, 6), "up.bias": (3,), "down.weight": (6, 3), "down.bias": (6,),
    }  # fmt: skip
    assert small(torch.randn(4, 6)).shape == (4, 6)
    mlp.up = nn.Linear(6, 13)
    with pytest.raises(ValueError, match="13 outputs for 10 neurons"):
        parts_of(mlp, "down")
    mlp.up = nn.Embedding(4, 6)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Embedding with weights"):
        parts_of(mlp, "down")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_mixture_survives_saving_and_writes_text(architecture: str, tmp_path: Path) -> None:
    register()
    dense = tiny_model(architecture)
    place = "transformer.h" if architecture == "gpt2" else "model.layers"
    item = {"module": f"{place}.2.mlp", "down": "c_proj" if architecture == "gpt2" else "down_proj", "experts": 3}
    made = PrMoeForCausalLM(PrMoeConfig(dense.config.to_dict(), [{**item, "size": 48}], top=2)).eval()
    made.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert [*mixtures_of(again)] == [f"model.{place}.2.mlp"]
    assert torch.equal(again(TOKENS).logits, made(TOKENS).logits)
    written = again.generate(TOKENS, max_new_tokens=4, do_sample=False)
    slow = TOKENS
    for _ in range(4):  # without the cache
        slow = torch.cat([slow, again(slow, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(written, slow)


def test_stock_transformers_refuses_it_by_name(tmp_path: Path) -> None:
    """It must never take a mixture for a dense model with random weights."""
    dense = tiny_model("llama")
    item = {"module": "model.layers.2.mlp", "down": "down_proj", "experts": 2, "size": 8}
    save_model(PrMoeForCausalLM(PrMoeConfig(dense.config.to_dict(), [item])), tmp_path)
    script = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "pr_moe" in ran.stderr
    assert AutoConfig.from_pretrained(tmp_path).model_type == "pr_moe"  # here it is registered
