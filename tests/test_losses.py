"""Losses and their weights against loops over the examples."""

import math

import pytest
import torch

from fedamm_pl.losses import example_losses, normalized_weights, weighted_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_example_losses_are_minus_the_log_of_the_softmax() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [
        math.log(sum(math.exp(score) for score in scores)) - scores[label]
        for scores, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    losses = example_losses(logits, labels)
    assert losses.shape == (6,)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_scores_lose_the_log_of_the_number_of_classes() -> None:
    assert example_losses(torch.zeros(2, 10), torch.tensor([3, 9])).tolist() == pytest.approx([math.log(10)] * 2)


def test_large_scores_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert example_losses(logits, torch.tensor([0, 0])).tolist() == [0.0, 1e4]


@pytest.mark.parametrize("raw", [[2.0], [1.0, 3.0], [0.0, 0.2, 0.7, 0.1], [1e-11, 3e-11]])
def test_normalized_weights_keep_the_ratios_and_sum_to_1(raw: list[float]) -> None:
    weights = normalized_weights(torch.tensor(raw, dtype=torch.float64))
    assert float(weights.sum()) == pytest.approx(1)
    assert weights.tolist() == pytest.approx([value / sum(raw) for value in raw])


def test_weights_of_sum_0_stay_0_and_have_finite_gradients() -> None:
    raw = torch.zeros(3, requires_grad=True)
    loss = weighted_loss(torch.tensor([1.0, 2.0, 3.0]), raw)
    loss.backward()
    assert normalized_weights(raw).tolist() == [0, 0, 0]
    assert loss.item() == 0
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_weighted_loss_equals_a_loop() -> None:
    losses, raw = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    total = sum(raw.tolist())
    expected = sum(weight / total * loss for weight, loss in zip(raw.tolist(), losses.tolist(), strict=True))
    assert float(weighted_loss(losses, raw)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [0.001, 0.5, 1.0])
def test_equal_weights_give_the_mean_loss(weight: float) -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert float(weighted_loss(losses, torch.full((3,), weight))) == pytest.approx(3.0)


def test_gradient_with_respect_to_the_weights_is_the_distance_from_the_mean() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    raw = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    loss = weighted_loss(losses, raw)
    loss.backward()
    assert raw.grad is not None
    # d/dv_i (sum_j v_j l_j / sum_j v_j) = (l_i - L) / sum_j v_j
    assert raw.grad.tolist() == pytest.approx([(value - loss.item()) / 1.0 for value in losses.tolist()])


def test_parts_of_a_weighted_loss_add_up_to_the_whole() -> None:
    losses, raw = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 0.75])
    parts = [weighted_loss(losses[part], raw[part], raw.sum()) for part in (slice(2), slice(2, 3))]
    torch.testing.assert_close(sum(parts), weighted_loss(losses, raw))
