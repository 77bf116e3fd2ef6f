"""``Weighing``: which loss of an example is weighted, and the inputs of the weight net."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from fedamm_pl.losses import Absent, example_losses, focal_losses, logit_adjusted_losses, weighted_loss

Objective = Literal["cross_entropy", "logit_adjusted", "focal"]
Losses = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Maps logits (B, C), labels (B,) and class counts (C,) or None to losses (B,)."""


def cross_entropy(logits: Tensor, labels: Tensor, class_counts: Tensor | None) -> Tensor:
    """Return the cross-entropy of each example; the class counts are not used."""
    return example_losses(logits, labels)


def losses_of_objective(objective: Objective, tau: float, absent: Absent, gamma: float) -> Losses:
    """Return the loss function of an objective, with its options."""
    match objective:
        case "logit_adjusted":
            return partial(_logit_adjusted, tau=tau, absent=absent)
        case "focal":
            return partial(_focal, gamma=gamma)
        case _:
            return cross_entropy


def _logit_adjusted(
    logits: Tensor, labels: Tensor, class_counts: Tensor | None, *, tau: float, absent: Absent
) -> Tensor:
    assert class_counts is not None
    return logit_adjusted_losses(logits, labels, class_counts, tau, absent)


def _focal(logits: Tensor, labels: Tensor, class_counts: Tensor | None, *, gamma: float) -> Tensor:
    return focal_losses(logits, labels, gamma)


@dataclass(frozen=True)
class Weighing:
    """How the examples of a batch are weighted.

    Attributes:
        objective: Computes the losses l_i, which are weighted and are the input of V.
        class_counts: Number of examples of each class, shape (C,), for the objective.
        families: Family of each class, shape (C,), for V; None: V depends on the loss alone.
        detached: Whether the virtual step treats V's input and the sum of the weights as constants, as in CMW-Net's
            program; otherwise both are differentiated.
    """

    objective: Losses = cross_entropy
    class_counts: Tensor | None = None
    families: Tensor | None = None
    detached: bool = False

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses l_i for logits (B, C) and labels (B,), shape (B,)."""
        return self.objective(logits, labels, self.class_counts)

    def weights(self, weight_net: Callable[..., Tensor], losses: Tensor, labels: Tensor) -> Tensor:
        """Return the weight V of each example, shape (B,)."""
        return weight_net(losses) if self.families is None else weight_net(losses, self.families[labels])

    def support_loss(
        self, weight_net: Callable[..., Tensor], losses: Tensor, labels: Tensor, present: Tensor | None = None
    ) -> Tensor:
        """Return the loss that the virtual step minimises, a scalar.

        Args:
            weight_net: The weight net V.
            losses: Losses l_i of shape (B,).
            labels: Classes of shape (B,).
            present: Which examples count, shape (B,); None: all.
        """
        raw = self.weights(weight_net, losses.detach() if self.detached else losses, labels)
        if present is not None:
            losses, raw = losses.where(present, 0), raw.where(present, 0)
        return weighted_loss(losses, raw, raw.sum().detach() if self.detached else None)


PLAIN = Weighing()
"""The weighing of Meta-Weight-Net: V depends on the cross-entropy."""
