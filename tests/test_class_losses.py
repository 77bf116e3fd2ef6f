"""Losses for imbalanced classes against slow loops, NumPy and torch's own functions, and at their extremes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedamm_pl.losses import (
    calibrated_losses,
    class_balanced_weights,
    contrastive_losses,
    example_losses,
    focal_losses,
    logit_adjusted_losses,
    without_absent,
)

COUNTS = torch.tensor([50, 7, 1, 0])
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    **{f"focal {gamma}": lambda z, y, g=gamma: focal_losses(z, y, g) for gamma in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)},  # type: ignore[misc]
    **{f"adjusted {tau}": lambda z, y, t=tau: logit_adjusted_losses(z, y, COUNTS, t) for tau in (0.0, 3.0)},  # type: ignore[misc]
    **{f"calibrated {tau}": lambda z, y, t=tau: calibrated_losses(z, y, COUNTS, t) for tau in (0.0, 3.0)},  # type: ignore[misc]
    **{
        f"{name}, {absent}": lambda z, y, f=function, a=absent: f(z, y, COUNTS, 1.0, a)  # type: ignore[misc]
        for name, function in (("adjusted", logit_adjusted_losses), ("calibrated", calibrated_losses))
        for absent in ("mask", "one")
    },
    "balanced": lambda z, y: class_balanced_weights(COUNTS, 0.99)[y] * example_losses(z, y),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scores() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


def slow_cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(score) for score in logits)) - logits[label]


# Focal.


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_losses_equal_a_loop(gamma: float) -> None:
    logits = scores()
    expected = []
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(score) for score in row)
        expected.append(-((1 - p) ** gamma) * math.log(p))
    assert focal_losses(logits, LABELS, gamma).tolist() == pytest.approx(expected, rel=1e-12)


def test_focal_losses_with_gamma_0_are_the_cross_entropy_bit_for_bit() -> None:
    logits = scores().float()
    assert torch.equal(focal_losses(logits, LABELS, 0.0), functional.cross_entropy(logits, LABELS, reduction="none"))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_slope_of_the_focal_loss_is_that_of_finite_differences(gamma: float) -> None:
    assert torch.autograd.gradcheck(lambda z: focal_losses(z, LABELS, gamma), scores().requires_grad_())


def test_focal_loss_of_a_nearly_right_example_keeps_its_digits() -> None:
    """p = 1 - 1e-6: (1 - p) from float32 probabilities would be wrong in the second digit."""
    logits = torch.tensor([[0.0, math.log(1e-6 / (1 - 1e-6))]])
    assert focal_losses(logits, torch.tensor([0]), 2.0).item() == pytest.approx(1e-12 * 1e-6, rel=1e-2)


# Class-balanced.


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("counts", [[4, 1, 0], [5000, 500, 50, 5], [1, 1], [0, 0, 3]])
def test_class_balanced_weights_equal_numpy(counts: list[int], beta: float) -> None:
    present = [n for n in counts if n]
    raw = [(1 - beta) / (1 - np.float64(beta) ** n) if n else 0.0 for n in counts]
    expected = [weight * len(present) / sum(raw) for weight in raw]
    weights = class_balanced_weights(torch.tensor(counts), beta)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert sum(weights.tolist()) / len(present) == pytest.approx(1)


def test_class_balanced_weights_with_beta_0_are_exactly_1_for_the_classes_present() -> None:
    assert class_balanced_weights(torch.tensor([5000, 3, 0, 1]), 0.0).tolist() == [1, 1, 0, 1]


def test_class_balanced_weights_towards_1_are_inverse_counts() -> None:
    counts = [5000, 500, 50]
    weights = class_balanced_weights(torch.tensor(counts), 1 - 1e-12)
    inverse = [1 / n for n in counts]
    assert weights.tolist() == pytest.approx([3 * value / sum(inverse) for value in inverse], rel=1e-6)


def test_class_balanced_weights_of_equal_counts_are_equal() -> None:
    assert class_balanced_weights(torch.full((10,), 37), 0.999).tolist() == pytest.approx([1.0] * 10)


@pytest.mark.parametrize("beta", [1e-300, 1e-9, 0.5, 0.9999999999])
def test_class_balanced_weights_of_large_counts_are_finite_and_fall_with_the_count(beta: float) -> None:
    weights = class_balanced_weights(torch.tensor([1, 2, 10**4, 10**9]), beta)
    assert weights.isfinite().all()
    assert (weights[:-1] >= weights[1:]).all()


# Logit adjustment.


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjusted_losses_equal_a_loop(tau: float) -> None:
    logits, counts = scores(), [50, 7, 1, 1]  # a class without examples counts as one
    expected = [
        slow_cross_entropy([z + tau * math.log(n / 59) for z, n in zip(row, counts, strict=True)], label)
        for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    assert logit_adjusted_losses(logits, LABELS, COUNTS, tau).tolist() == pytest.approx(expected, rel=1e-12)


def test_tau_1_is_the_balanced_softmax() -> None:
    """-log(n_y e^(z_y) / sum_c n_c e^(z_c))"""
    logits, counts = scores(), torch.tensor([50, 7, 1, 20])
    mass = counts * logits.exp()
    expected = -(mass[torch.arange(6), LABELS] / mass.sum(1)).log()
    torch.testing.assert_close(logit_adjusted_losses(logits, LABELS, counts, 1.0), expected)


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_tau_0_is_the_cross_entropy_bit_for_bit(function: Any) -> None:
    logits = scores().float()
    assert torch.equal(function(logits, LABELS, COUNTS, 0.0, "one"), example_losses(logits, LABELS))


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_equal_counts_change_nothing(function: Any) -> None:
    logits = scores()
    torch.testing.assert_close(function(logits, LABELS, torch.full((4,), 9), 1.3), example_losses(logits, LABELS))


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_counts_beyond_the_range_of_float16(function: Any) -> None:
    logits, counts = scores().half(), torch.tensor([140_000, 70_000, 800, 30])
    torch.testing.assert_close(
        function(logits, LABELS, counts, 1.0).double(),
        function(logits.double(), LABELS, counts, 1.0),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_rare_classes_lose_more_at_equal_scores(function: Any) -> None:
    losses = function(torch.zeros(4, 4), torch.arange(4), torch.tensor([50, 7, 3, 1]), 1.0)
    assert (losses[1:] > losses[:-1]).all()


# Calibration.


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_calibrated_losses_equal_a_loop(tau: float) -> None:
    logits, counts = scores(), [50, 7, 1, 1]
    expected = [
        slow_cross_entropy([z - tau * n**-0.25 for z, n in zip(row, counts, strict=True)], label)
        for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    assert calibrated_losses(logits, LABELS, COUNTS, tau, "one").tolist() == pytest.approx(expected, rel=1e-12)


# Absent classes.


HELD = torch.tensor([0, 1, 2, 0, 1, 2])
"""Labels of classes that have examples."""


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("function", "shift"),
    [(logit_adjusted_losses, lambda n: math.log(n / 58)), (calibrated_losses, lambda n: -(n**-0.25))],
)
def test_masked_losses_are_those_of_a_softmax_over_the_classes_held(
    function: Any, shift: Callable[[int], float], tau: float
) -> None:
    logits = scores()
    expected = [
        slow_cross_entropy([z + tau * shift(n) for z, n in zip(row[:3], [50, 7, 1], strict=True)], label)
        for row, label in zip(logits.tolist(), HELD.tolist(), strict=True)
    ]
    assert function(logits, HELD, COUNTS, tau, "mask").tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_a_masked_class_is_not_pushed_and_one_that_counts_as_one_is(function: Any) -> None:
    for absent in ("mask", "one"):
        logits = scores().requires_grad_()
        (slope,) = torch.autograd.grad(function(logits, HELD, COUNTS, 1.0, absent).sum(), logits)
        assert slope.isfinite().all()
        assert (slope[:, 3] == 0).all() if absent == "mask" else (slope[:, 3] > 0).all()


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_a_softmax_over_a_single_class_has_a_loss_of_0_and_no_slope(function: Any) -> None:
    logits = scores().requires_grad_()
    losses = function(logits, torch.zeros(6, dtype=torch.int64), torch.tensor([9, 0, 0, 0]), 1.0, "mask")
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [0.0] * 6
    assert not slope.any()


@pytest.mark.parametrize("function", [logit_adjusted_losses, calibrated_losses])
def test_where_every_class_is_held_a_mask_changes_no_bit(function: Any) -> None:
    logits, counts = scores().float(), torch.tensor([50, 7, 1, 3])
    assert torch.equal(*(function(logits, LABELS, counts, 1.0, absent) for absent in ("mask", "one")))


def test_a_label_that_the_counts_deny_keeps_its_own_class() -> None:
    shown = without_absent(torch.zeros(2, 4), torch.tensor([3, 0]), torch.tensor([5, 0, 1, 0]))
    assert shown.isfinite().tolist() == [[True, False, True, True], [True, False, True, False]]


def test_masks_of_several_clients_side_by_side_are_those_of_each() -> None:
    logits, labels = torch.randn(2, 6, 4), torch.stack([LABELS, HELD])
    counts = torch.tensor([[50, 7, 1, 2], [50, 7, 1, 0]])
    for function in (logit_adjusted_losses, calibrated_losses):
        found = torch.func.vmap(lambda *parts, f=function: f(*parts, 1.0, "mask"))(logits, labels, counts)
        for row in range(2):
            torch.testing.assert_close(found[row], function(logits[row], labels[row], counts[row], 1.0, "mask"))


# Contrast.


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_contrastive_losses_are_a_cross_entropy_of_cosines(temperature: float) -> None:
    z, positive, negative = torch.randn(3, 5, 8, dtype=torch.float64)
    cosines = torch.stack([functional.cosine_similarity(z, other) for other in (positive, negative)], 1)
    expected = functional.cross_entropy(cosines / temperature, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(contrastive_losses(z, positive, negative, temperature), expected)


def test_contrastive_loss_of_equal_models_is_log_2_with_slope_0() -> None:
    z = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 8, dtype=torch.float64)
    losses = contrastive_losses(z, other, other, 0.5)
    assert losses.tolist() == pytest.approx([math.log(2)] * 5)
    (slope,) = torch.autograd.grad(losses.sum(), z)
    assert slope.abs().max() < 1e-12


def test_contrastive_loss_falls_towards_the_positive_and_rises_towards_the_negative() -> None:
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    losses = [contrastive_losses(z, near, far, 0.5).item() for z in (near, near + far, far)]
    assert losses == pytest.approx([math.log1p(math.exp(-2)), math.log(2), math.log1p(math.exp(2))])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e15])
def test_contrastive_losses_of_extreme_features_have_finite_slopes(scale: float) -> None:
    z = (scale * torch.randn(4, 8)).requires_grad_()
    losses = contrastive_losses(z, scale * torch.randn(4, 8), scale * torch.randn(4, 8), 1e-3)
    (slope,) = torch.autograd.grad(losses.sum(), z)
    assert losses.isfinite().all()
    assert slope.isfinite().all()


# Extremes.


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("margin", [20.0, 200.0, 1e4])
def test_losses_and_slopes_are_finite_for_extreme_logits(
    loss: Loss, dtype: torch.dtype, right: bool, margin: float
) -> None:
    chosen = functional.one_hot(LABELS, 4).to(dtype)
    logits = (margin * (chosen if right else -chosen)).requires_grad_()
    losses = loss(logits, LABELS)
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    assert slope.isfinite().all()


@every_loss
def test_losses_have_a_value_for_each_example_and_the_type_of_the_logits(loss: Loss) -> None:
    for dtype in (torch.float32, torch.float64):
        losses = loss(scores().to(dtype), LABELS)
        assert losses.shape == (6,)
        assert losses.dtype == dtype


@every_loss
def test_no_loss_changes_its_arguments(loss: Loss) -> None:
    logits, labels, counts = scores(), LABELS.clone(), COUNTS.clone()
    before = logits.clone()
    loss(logits, labels)
    assert torch.equal(logits, before)
    assert torch.equal(labels, LABELS)
    assert torch.equal(counts, COUNTS)
