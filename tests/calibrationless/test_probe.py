"""The probe on models of a few weights, against sums written out."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from calibrationless import Probe, Scalar, Watch, run_probe

HIDDEN, INNER, TOKENS = 6, 10, 5


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Experts(nn.Module):
    """Two experts in one parameter, [2, out, in] or [2, in, out]; the first two tokens go to expert 0."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.down = nn.Parameter(torch.randn(2, INNER, HIDDEN) if transposed else torch.randn(2, HIDDEN, INNER))

    def forward(self, x: Tensor) -> Tensor:
        parts = enumerate((x[:, :2], x[:, 2:]))
        return torch.cat(
            [part @ self.down[e] if self.transposed else linear(part, self.down[e]) for e, part in parts], dim=1
        )


class Layer(nn.Module):
    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER, bias=False), down

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + self.down(torch.relu(self.up(hidden_states))),)


DOWNS = {
    "linear": (lambda: nn.Linear(INNER, HIDDEN), "weight", None),
    "conv1d": (lambda: Conv1D(INNER, HIDDEN), "weight", None),
    "experts": (lambda: Experts(False), "down", 1),
    "transposed experts": (lambda: Experts(True), "down", 1),
}
every_down = pytest.mark.parametrize("kind", DOWNS)


def build(kind: str, seed: int = 0) -> tuple[nn.Sequential, Watch, Tensor]:
    """A model of one layer, the watch of its down projection, and a prompt [1, tokens, hidden]."""
    torch.manual_seed(seed)
    make, parameter, expert = DOWNS[kind]
    transposed = kind in ("conv1d", "transposed experts")
    watch = Watch("down", "0.down", parameter, expert, down=True, transposed=transposed)
    return nn.Sequential(Layer(make())), watch, torch.randn(1, TOKENS, HIDDEN)


def probe_of(model: nn.Module, watch: Watch, prompt: Tensor, **options: object) -> Probe:
    return run_probe(model, lambda: model(prompt)[0][0], [watch], ["0"], **options)


def by_hand(model: nn.Sequential, watch: Watch, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x [tokens, in], W [out, in], bias [out]) of the watched product."""
    x = torch.relu(prompt[0] @ model[0].up.weight.T)
    weight = getattr(model[0].down, watch.parameter)
    if watch.expert is not None:
        x, weight = x[2:], weight[watch.expert]
    bias = getattr(model[0].down, "bias", torch.zeros(HIDDEN))
    return x.detach(), (weight.T if watch.transposed else weight).detach(), bias.detach()


@every_down
def test_energy_and_peaks_are_those_of_a_loop(kind):
    model, watch, prompt = build(kind)
    x, weight, bias = by_hand(model, watch, prompt)
    record = probe_of(model, watch, prompt).linears["down"]
    for col in range(INNER):
        assert record.energy[col].item() == pytest.approx(
            sum(token[col] ** 2 / sum(value**2 for value in token) for token in x.tolist()) / len(x), rel=1e-5
        )
    for peak, activation in ((record.input, x), (record.output, x @ weight.T + bias)):
        rows = activation.tolist()
        places = [(token, channel) for token in range(len(rows)) for channel in range(len(rows[0]))]
        token, channel = max(places, key=lambda place: abs(rows[place[0]][place[1]]))
        assert (peak.token, peak.channel, peak.value) == (token, channel, pytest.approx(rows[token][channel], rel=1e-5))
        magnitudes = sorted(map(abs, rows[token]))
        assert peak.median == pytest.approx(magnitudes[(len(magnitudes) - 1) // 2], rel=1e-4, abs=1e-6)
        assert peak.ratio == (pytest.approx(abs(peak.value) / peak.median) if peak.median else float("inf"))


@every_down
def test_contributions_are_the_largest_terms_of_the_largest_output(kind):
    model, watch, prompt = build(kind)
    x, weight, bias = by_hand(model, watch, prompt)
    record = probe_of(model, watch, prompt).linears["down"]
    token, row, value = record.output.token, record.output.channel, record.output.value
    terms = {col: x[token, col].item() * weight[row, col].item() / value for col in range(INNER)}
    assert sum(terms.values()) + bias[row].item() / value == pytest.approx(1, rel=1e-4)
    assert [c.share for c in record.contributions] == pytest.approx(sorted(terms.values(), reverse=True)[:8], rel=1e-4)
    for c in record.contributions:
        assert (c.input, c.weight) == (x[token, c.col].item(), weight[row, c.col].item())
        assert c.share == pytest.approx(terms[c.col], rel=1e-4)


@every_down
def test_the_rows_with_the_largest_outputs_are_explained_largest_first(kind):
    model, watch, prompt = build(kind)
    x, weight, bias = by_hand(model, watch, prompt)
    outputs = x @ weight.T + bias
    spikes = probe_of(model, watch, prompt).linears["down"].spikes
    heights = outputs.abs().amax(dim=0)
    assert [spike.output.channel for spike in spikes] == heights.argsort(descending=True).tolist()
    for spike in spikes:
        token, row = spike.output.token, spike.output.channel
        assert (abs(spike.output.value), token) == (pytest.approx(float(heights[row])), outputs[:, row].abs().argmax())
        best = spike.contributions[0]
        assert best.share == pytest.approx(float((x[token] * weight[row]).div(spike.output.value).max()), rel=1e-4)


def test_only_a_down_projection_is_explained():
    model, _, prompt = build("linear")
    assert probe_of(model, Watch("up", "0.up"), prompt).linears["up"].contributions == ()


@every_down
def test_the_residual_is_the_largest_value_of_every_channel_before_and_after_each_layer(kind):
    model, watch, prompt = build(kind)
    probe = probe_of(model, watch, prompt)
    assert len(probe.residual) == 2
    for residual, state in zip(probe.residual, (prompt[0], model(prompt)[0][0]), strict=True):
        for channel in range(HIDDEN):
            token = int(state[:, channel].abs().argmax())
            assert (residual.tokens[channel], residual.values[channel]) == (token, state[token, channel])
        assert torch.equal(residual.medians, state.abs().median(dim=1).values)
    assert torch.equal(probe.logits, model(prompt)[0][0])
    assert not probe.logits.requires_grad


def test_the_residual_of_a_short_prompt_is_kept_whole():
    model, watch, _ = build("linear")
    for tokens, whole in ((64, True), (65, False)):
        prompt = torch.randn(1, tokens, HIDDEN)
        entering, leaving = probe_of(model, watch, prompt).residual
        assert (entering.whole is not None) == (leaving.whole is not None) == whole
        for channel in range(HIDDEN):
            for token in range(tokens):
                known = whole or token == int(entering.tokens[channel])
                assert entering.at(token, channel) == (float(prompt[0, token, channel]) if known else 0.0)


def test_a_layer_may_return_a_list():
    model, watch, prompt = build("linear")
    expected = probe_of(model, watch, prompt).residual[1].values
    forward = model[0].forward
    model[0].forward = lambda hidden_states: [*forward(hidden_states)]
    assert torch.equal(probe_of(model, watch, prompt).residual[1].values, expected)


def down_weight(model: nn.Sequential, watch: Watch) -> Tensor:
    """The watched weight as [out, in], to be changed in place."""
    weight = getattr(model[0].down, watch.parameter).data
    weight = weight if watch.expert is None else weight[watch.expert]
    return weight.T if watch.transposed else weight


@given(
    st.sampled_from(list(DOWNS)),
    st.lists(st.tuples(st.integers(0, HIDDEN - 1), st.integers(0, INNER - 1)), unique=True, max_size=4),
)
@settings(max_examples=30)
def test_pruning_equals_zeroing_the_weights(kind, points):
    model, watch, prompt = build(kind)
    pruned = probe_of(model, watch, prompt, prune=[Scalar("down", row, col) for row, col in points])
    for row, col in points:
        down_weight(model, watch)[row, col] = 0
    expected = probe_of(model, watch, prompt)
    assert torch.allclose(pruned.logits, expected.logits, atol=1e-5)
    assert torch.allclose(pruned.residual[1].values, expected.residual[1].values, atol=1e-5)
    assert pruned.linears["down"].output.value == pytest.approx(expected.linears["down"].output.value, rel=1e-4)


@every_down
def test_a_pruned_weight_contributes_nothing(kind):
    model, watch, prompt = build(kind)
    prompt.abs_()
    model[0].up.weight.data.abs_()
    down_weight(model, watch)[2].abs_().mul_(50)  # row 2 has the largest output, and no term of it is negative
    col = probe_of(model, watch, prompt).linears["down"].contributions[0].col
    pruned = probe_of(model, watch, prompt, prune=[Scalar("down", 2, col)]).linears["down"]
    down_weight(model, watch)[2, col] = 0
    expected = probe_of(model, watch, prompt).linears["down"]
    assert [c.share for c in pruned.contributions] == pytest.approx(
        [c.share for c in expected.contributions], rel=1e-3, abs=1e-5
    )


def test_pruning_a_super_weight_of_a_bfloat16_model_equals_zeroing_it():
    model, watch, prompt = build("linear")
    model, prompt = model.bfloat16(), prompt.bfloat16().abs()
    model[0].up.weight.data[3] = 10  # the input of the super weight is large
    down_weight(model, watch)[1, 3] = 100
    pruned = probe_of(model, watch, prompt, prune=[Scalar("down", 1, 3)]).logits
    down_weight(model, watch)[1, 3] = 0
    assert torch.allclose(pruned, probe_of(model, watch, prompt).logits, atol=0.05, rtol=0.02)


def test_the_first_residual_is_found_when_it_is_passed_by_keyword():
    model, watch, prompt = build("linear")
    probe = run_probe(model, lambda: model[0](hidden_states=prompt)[0][0], [watch], ["0"])
    assert torch.equal(probe.residual[0].values, probe_of(model, watch, prompt).residual[0].values)


def test_without_recording_only_the_logits_are_kept():
    model, watch, prompt = build("linear")
    probe = probe_of(model, watch, prompt, record=False, prune=[Scalar("down", 0, 0)])
    assert (probe.linears, probe.residual) == ({}, [])
    down_weight(model, watch)[0, 0] = 0
    assert torch.allclose(probe.logits, model(prompt)[0][0], atol=1e-5)


class Batched(nn.Module):
    """All experts at once: the parameter meets its product whole."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.multiply, self.down = multiply, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.down)


AT_ONCE = {  # to multiply inputs [experts, tokens, in] with weights [experts, out, in], or with [experts, in, out]
    "bmm": (torch.bmm, True),
    "method": (lambda x, w: x.bmm(w), True),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(2, 1, HIDDEN), x, w), True),
    "matmul": (torch.matmul, True),
    "the transpose": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), False),
    "a batch": (lambda x, w: torch.matmul(x.unsqueeze(0), w)[0], True),
}


@pytest.mark.parametrize("way", AT_ONCE)
def test_a_product_of_all_experts_at_once_is_seen_expert_by_expert(way):
    torch.manual_seed(0)
    multiply, transposed = AT_ONCE[way]
    x, weight = torch.randn(2, TOKENS, INNER), torch.randn(2, HIDDEN, INNER)
    x[1, :2] = 0  # tokens that were not sent to expert 1
    model = nn.Sequential(Batched(multiply, weight.mT.clone() if transposed else weight.clone()))
    watches = [Watch(str(e), "0", "down", expert=e, down=True, transposed=transposed) for e in range(2)]
    probe = run_probe(model, lambda: model(x), watches, [])
    assert set(probe.linears) == {"0", "1"}
    for expert, rows in enumerate((x[0], x[1, 2:])):
        record = probe.linears[str(expert)]
        outputs = rows @ weight[expert].T
        assert torch.allclose(record.energy, energy(rows))
        assert record.output.value == pytest.approx(float(outputs.flatten()[outputs.abs().argmax()]), rel=1e-5)
    pruned = run_probe(model, lambda: model(x), watches, [], prune=[Scalar("1", 3, 4)]).logits
    twice = run_probe(model, lambda: model(x), watches, [], replace={"0": lambda matrix: 2 * matrix}).logits
    assert torch.allclose(twice, x @ torch.stack([2 * weight[0], weight[1]]).mT, atol=1e-5)
    weight[1, 3, 4] = 0
    assert torch.allclose(pruned, x @ weight.mT, atol=1e-5)


def test_an_expert_that_no_token_was_sent_to_is_not_seen():
    x = torch.randn(2, TOKENS, INNER)
    x[0] = 0
    model = nn.Sequential(Batched(torch.bmm, torch.randn(2, INNER, HIDDEN)))
    watches = [Watch(str(e), "0", "down", expert=e, transposed=True) for e in range(2)]
    assert set(run_probe(model, lambda: model(x), watches, []).linears) == {"1"}


def energy(x: Tensor) -> Tensor:
    return (x / x.norm(dim=1, keepdim=True)).square().mean(dim=0)


class Product(nn.Module):
    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.multiply, self.weight = multiply, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


WAYS = {  # to multiply with a weight [out, in], or with one [in, out]
    "linear": (lambda x, w: linear(x, w), False),
    "linear by keyword": (lambda x, w: linear(x, weight=w), False),
    "the transpose": (lambda x, w: x @ w.T, False),
    "operator": (lambda x, w: x @ w, True),
    "method": (lambda x, w: x.matmul(w), True),
    "matmul": (lambda x, w: torch.matmul(x, w), True),
    "mm": (lambda x, w: torch.mm(x, w), True),
    "addmm": (lambda x, w: torch.addmm(torch.ones(3), x, w), True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_product_is_seen_and_pruned_however_it_is_written(way):
    multiply, transposed = WAYS[way]
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    model = nn.Sequential(Product(multiply, weight.T.clone() if transposed else weight.clone()))
    watch = Watch("w", "0", transposed=transposed)
    record = run_probe(model, lambda: model(x), [watch], []).linears.get("w")
    assert record is not None
    assert torch.allclose(record.energy, energy(x))
    assert torch.equal(record.peaks, x.abs().amax(dim=0))
    pruned = run_probe(model, lambda: model(x), [watch], [], prune=[Scalar("w", 1, 2)]).logits
    weight[1, 2] = 0
    assert torch.allclose(pruned, x @ weight.T + (1 if way == "addmm" else 0), atol=1e-6)


@every_down
def test_weights_that_are_only_in_memory_during_the_call_are_seen(kind):
    model, watch, prompt = build(kind)
    expected, module = probe_of(model, watch, prompt), model[0].down
    kept, forward, col = dict(module._parameters), module.forward, expected.linears["down"].contributions[0].col

    def offloaded(x: Tensor) -> Tensor:  # what accelerate's hooks do
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(parameter.detach().clone())
        try:
            return forward(x)
        finally:
            for name, parameter in kept.items():
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"))

    module.forward = offloaded
    assert probe_of(model, watch, prompt).linears["down"].contributions == expected.linears["down"].contributions
    pruned = probe_of(model, watch, prompt, prune=[Scalar("down", 2, col)])
    assert torch.equal(pruned.linears["down"].energy, expected.linears["down"].energy)
    assert not torch.equal(pruned.logits, expected.logits)


def test_nothing_is_left_on_the_model_even_after_an_error():
    model, watch, prompt = build("linear")
    probe_of(model, watch, prompt)
    with pytest.raises(RuntimeError):
        probe_of(model, watch, prompt[..., :3])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_does_not_exist_is_refused_by_name():
    model, watch, prompt = build("linear")
    with pytest.raises(ValueError, match=r"no module 'layers.0'"):
        run_probe(model, lambda: model(prompt)[0][0], [watch], ["layers.0"])
    with pytest.raises(ValueError, match=r"no module '0.mlp'"):
        run_probe(model, lambda: model(prompt)[0][0], [Watch("w", "0.mlp")], ["0"])
    with pytest.raises(ValueError, match="cannot prune 'up'"):
        probe_of(model, watch, prompt, prune=[Scalar("up", 0, 0)])
