"""Changes of a model do what they say and can be undone."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from calibrationless import massive_channels
from swquant.checkpoints.open import open_checkpoint
from swquant.models.loading import build_model
from swquant.models.rounded_inputs import RoundedLinear
from swquant.study.activations import inputs_rounded
from swquant.study.changes import activation_restored, largest_pruned, rounded, scaled
from swquant.study.subject import Subject


@pytest.mark.parametrize(
    "name", ["pruned", "amplified", "largest", "restored activation", "rounded", "refined", "inputs"]
)
def test_a_change_leaves_no_trace(subject: Subject, name: str) -> None:
    weights = subject.super_weights
    change = {
        "pruned": lambda: scaled(0, weights),
        "amplified": lambda: scaled(3, weights),
        "largest": lambda: largest_pruned(50),
        "restored activation": lambda: activation_restored(weights),
        "rounded": lambda: rounded("tensor", "plain", subject),
        "refined": lambda: rounded("flat:128", "refined", subject),
        "inputs": lambda: inputs_rounded("per tensor", "channels"),
    }[name]()
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        logits = subject.model(ids).logits
        with suppress(KeyError), change.apply(subject):  # also when it ends badly
            changed = subject.model(ids).logits
            raise KeyError
        assert not torch.equal(changed, logits)
        assert torch.equal(subject.model(ids).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())


def test_the_restored_activation_is_the_planted_one(subject: Subject) -> None:
    """At its token the channel is what it was; at others it stays pruned."""
    outputs: list[torch.Tensor] = []
    module = subject.model.get_submodule("model.layers.1.mlp.down_proj")
    ids = torch.tensor([[5, 9, 17, 33]])

    def run() -> torch.Tensor:
        handle = module.register_forward_hook(lambda *args: outputs.append(args[2][0, :, 37].clone()))
        with torch.no_grad():
            subject.model(ids)
        handle.remove()
        return outputs.pop()

    full = run()
    with scaled(0, subject.super_weights).apply(subject):
        pruned = run()
    with activation_restored(subject.super_weights).apply(subject):
        restored = run()
    assert restored[0] == full[0] > 10_000
    assert torch.equal(restored[1:], pruned[1:])


def test_the_largest_other_weights_are_pruned(subject: Subject) -> None:
    with largest_pruned(50).apply(subject):
        values = torch.cat([matrix.flatten() for matrix in subject.matrices()])
        assert int((values == 0).sum()) == 50
        assert subject.down(subject.super_weights[0].name)[37, 101] == 60.0
    rest = torch.cat([matrix.flatten() for matrix in subject.matrices()]).abs().sort().values
    assert float(values.abs().sort().values[-2]) == float(rest[-52])  # the super weight, then the first that was spared


def test_rounded_inputs_are_those_of_a_loaded_checkpoint(subject: Subject) -> None:
    ids = torch.tensor([[5, 9, 17, 33]])
    for scale, per_token in (("per tensor", False), ("per token", True)):
        with torch.no_grad(), inputs_rounded(scale, "channels").apply(subject):
            ours = subject.model(ids).logits
        with open_checkpoint(subject.checkpoint.folder) as checkpoint:
            model = build_model(checkpoint, torch.float32)
        for name, linear in subject.found.architecture.weights.items():
            channels = massive_channels(subject.found.record(name).peaks).long()
            rounded_linear = RoundedLinear(model.get_submodule(linear.module), channels, per_token=per_token)
            model.set_submodule(linear.module, rounded_linear)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, ours)
