"""Losses as pure functions: cross-entropy, its variants for imbalanced classes, and weighted sums."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Absent = Literal["mask", "one"]
"""How a class without examples is treated: it leaves the softmax (``mask``), or counts as one example (``one``)."""
LEAST_TOTAL = 1e-12
"""Weights with a smaller sum are not normalised.

Second derivatives contain 1 / sum^2, which overflows in float32 below 1e-19.
"""


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: Scores of shape (B, C).
        labels: Classes of shape (B,).

    Returns:
        Losses of shape (B,).
    """
    return functional.cross_entropy(logits, labels, reduction="none")


def normalized_weights(raw: Tensor, total: Tensor | None = None) -> Tensor:
    """Divide weights by their sum, or return them unchanged if it is almost 0 (Shu et al., NeurIPS 2019, eq. 4).

    Args:
        raw: Non-negative weights V(l_i) of shape (B,).
        total: The sum over the whole batch, if ``raw`` holds the weights of a part of it.

    Returns:
        omega_i = V(l_i) / sum_j V(l_j), shape (B,); V(l_i) itself where the sum is below ``LEAST_TOTAL``.

    Example:
        >>> normalized_weights(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    total = raw.sum() if total is None else total
    return raw / torch.where(total < LEAST_TOTAL, torch.ones_like(total), total)


def weighted_loss(losses: Tensor, raw: Tensor, total: Tensor | None = None) -> Tensor:
    """Weighted batch loss L = sum_i omega_i l_i with normalised weights.

    Args:
        losses: l_i of shape (B,).
        raw: Weights V(l_i) before normalisation, shape (B,).
        total: The sum of the weights of the whole batch, if this is a part of it; the part's share of the loss is
            returned.

    Returns:
        A scalar.
    """
    return (normalized_weights(raw, total) * losses).sum()


def focal_losses(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss -(1 - p)^gamma log p of each example with probability p of its class (Lin et al., ICCV 2017, eq. 4).

    Args:
        logits: Scores of shape (B, C).
        labels: Classes of shape (B,).
        gamma: 0 gives the cross-entropy.

    Returns:
        Losses of shape (B,).
    """
    losses = example_losses(logits, labels)
    if gamma == 0:
        return losses
    wrong = -torch.expm1(-losses)  # 1 - p, without cancellation
    return (
        wrong.clamp(min=torch.finfo(losses.dtype).tiny) ** gamma * losses
    )  # 0 ** gamma may have an infinite derivative


def class_balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights (1 - beta) / (1 - beta^n_c), normalised to a mean of 1 over the classes present (Cui et al., CVPR 2019).

    Args:
        counts: Examples n_c of each class, shape (C,).
        beta: In [0, 1); 0 gives equal weights, and near 1 they become proportional to 1 / n_c.

    Returns:
        Weights of shape (C,); 0 for a class without examples.

    Example:
        >>> class_balanced_weights(torch.tensor([4, 1, 0]), 0.5)
        tensor([0.6957, 1.3043, 0.0000])
    """
    present = counts > 0
    effective = (
        -torch.expm1(counts.double().clamp(min=1) * math.log(beta)) if beta else torch.ones_like(counts).double()
    )
    weights = torch.where(present, 1 / effective, 0.0)
    return (weights * present.sum() / weights.sum()).float()


def without_absent(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Remove classes without examples from the softmax, so that their logits get no gradient.

    The class of an example's label always stays, even if its count is 0.

    Args:
        logits: Scores of shape (B, C).
        labels: Classes of shape (B,).
        counts: Examples n_c of each class, shape (C,).

    Returns:
        Scores of shape (B, C), -inf for the classes that are removed.

    Example:
        >>> without_absent(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([5, 0, 0]))
        tensor([[0., -inf, -inf],
                [0., -inf, 0.]])
    """
    others = torch.arange(len(counts), device=labels.device) != labels[:, None]  # (B, C)
    return logits.masked_fill((counts == 0) & others, -math.inf)


def logit_adjusted_losses(logits: Tensor, labels: Tensor, counts: Tensor, tau: float, absent: Absent = "one") -> Tensor:
    """Cross-entropy on z_c + tau log pi_c (Menon et al., ICLR 2021, eq. 10); tau = 1 is the balanced softmax.

    Args:
        logits: Scores z of shape (B, C).
        labels: Classes of shape (B,).
        counts: Examples n_c of each class, shape (C,), taken as at least 1 in the prior; pi_c is the share of class c.
        tau: 0 gives the cross-entropy.
        absent: Whether a class without examples counts as one example, or leaves the softmax (n_c = 0: pi_c = 0).

    Returns:
        Losses of shape (B,).
    """
    shown = logits if absent == "one" else without_absent(logits, labels, counts)
    counts = counts.to(torch.promote_types(logits.dtype, torch.float32)).clamp(min=1)  # a sum in float16 ends at 65,504
    return example_losses(shown + tau * (counts / counts.sum()).log(), labels)


def calibrated_losses(logits: Tensor, labels: Tensor, counts: Tensor, tau: float, absent: Absent = "mask") -> Tensor:
    """Cross-entropy on z_c - tau n_c^(-1/4) (FedLC; Zhang et al., ICML 2022).

    Args:
        logits: Scores z of shape (B, C).
        labels: Classes of shape (B,).
        counts: Examples n_c of each class at the client, shape (C,), taken as at least 1 in the shift.
        tau: 0 gives the cross-entropy over the classes that stay.
        absent: Whether a class without examples leaves the softmax (n_c -> 0: an infinite shift), or counts as one
            example.

    Returns:
        Losses of shape (B,).
    """
    shown = logits if absent == "one" else without_absent(logits, labels, counts)
    return example_losses(
        shown - tau * counts.to(torch.promote_types(logits.dtype, torch.float32)).clamp(min=1) ** -0.25, labels
    )


def contrastive_losses(features: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Model-contrastive loss of each example (MOON; Li et al., CVPR 2021, eq. 3).

    ``-log(exp(s_p / T) / (exp(s_p / T) + exp(s_n / T)))`` with cosine similarities s_p to the global model's features
    and s_n to those of the client's previous model.

    Args:
        features: Features of the model being trained, shape (B, D).
        positive: Features of the global model, shape (B, D).
        negative: Features of the previous local model, shape (B, D).
        temperature: T, above 0.

    Returns:
        Losses of shape (B,).
    """
    near = functional.cosine_similarity(features, positive)
    far = functional.cosine_similarity(features, negative)
    return functional.softplus((far - near) / temperature)
