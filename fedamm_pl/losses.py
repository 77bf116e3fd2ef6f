"""Losses as pure functions: per-example cross-entropy and its weighted sums."""

import torch
from torch import Tensor
from torch.nn import functional


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: Scores of shape (B, C).
        labels: Classes of shape (B,).

    Returns:
        Losses of shape (B,).
    """
    return functional.cross_entropy(logits, labels, reduction="none")


def normalized_weights(raw: Tensor) -> Tensor:
    """Divide weights by their sum, or leave them as they are if it is 0 (Shu et al., NeurIPS 2019, eq. 4).

    Args:
        raw: Non-negative weights V(l_i) of shape (B,).

    Returns:
        omega_i = V(l_i) / sum_j V(l_j), shape (B,).

    Example:
        >>> normalized_weights(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    total = raw.sum()
    return raw / torch.where(total == 0, torch.ones_like(total), total)


def weighted_loss(losses: Tensor, raw: Tensor) -> Tensor:
    """Weighted batch loss L = sum_i omega_i l_i with normalised weights.

    Args:
        losses: l_i of shape (B,).
        raw: Weights V(l_i) before normalisation, shape (B,).

    Returns:
        A scalar.
    """
    return (normalized_weights(raw) * losses).sum()
