"""Losses, against torch's own."""

import torch

from swquant.training.losses import cross_entropy, divergence


def test_divergence_and_its_gradient_are_those_of_torch() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 200, 11, dtype=torch.float64, requires_grad=True)
    teacher, counted = 3 * torch.randn(2, 200, 11, dtype=torch.float64), torch.rand(2, 200) < 0.7
    loss = divergence(student, teacher, counted)
    expected = torch.nn.functional.kl_div(
        student[counted].log_softmax(-1), teacher[counted].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert torch.allclose(loss, expected)
    (mine,) = torch.autograd.grad(3 * loss, student)
    (theirs,) = torch.autograd.grad(3 * expected, student)
    assert torch.allclose(mine, theirs)
    assert float(divergence(teacher, teacher, counted)) == 0.0


def test_where_nothing_asks_for_a_gradient_none_is_made() -> None:
    logits = torch.randn(3, 5)
    assert not divergence(logits, torch.randn(3, 5), torch.ones(3, dtype=torch.bool)).requires_grad


def test_cross_entropy_is_the_mean_over_what_counts() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    counted = torch.tensor([[True, False, True, False], [False, False, False, True]])
    expected = -(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)[counted]).mean()
    assert torch.allclose(cross_entropy(logits, targets, counted), expected)
