"""Sums of features per class, which add up over clients and give means and covariances, and draws from a Gaussian."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_FEATURE = torch.finfo(torch.float32).max
ROUNDING = 1e-9
"""Relative rounding error that is allowed in a sum of squares."""


def require_counts(counts: Sequence[int], num_examples: int) -> None:
    """Check that a client's class counts match its number of examples.

    Args:
        counts: Number of examples of each class.
        num_examples: Number of examples that the client reports.

    Raises:
        ValueError: If a count is below 0, or they do not add up to ``num_examples``.
    """
    if min(counts) < 0:
        raise ValueError(f"its class counts are below 0: {min(counts)}")
    if sum(counts) != num_examples:
        raise ValueError(f"its class counts add up to {sum(counts)}, it reports {num_examples} examples")


def no_sums(num_classes: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (C,), sums (C, D) and the upper triangles of sums of products (C, D (D + 1) / 2), all 0."""
    sums = torch.zeros(num_classes, size, dtype=torch.float64)
    products = torch.zeros(num_classes, size * (size + 1) // 2, dtype=torch.float64)
    return torch.zeros(num_classes, dtype=torch.int64), sums, products


def add_features(features: Tensor, labels: Tensor, counts: Tensor, sums: Tensor, products: Tensor) -> None:
    """Add a batch of features in place to the sums of :func:`no_sums`, in float64.

    Args:
        features: Features of shape (B, D).
        labels: Classes of shape (B,).
        counts: Number of examples of each class, shape (C,).
        sums: Sums of the features, shape (C, D).
        products: Upper triangles of the sums of products, shape (C, D (D + 1) / 2).
    """
    rows, columns = torch.triu_indices(features.shape[1], features.shape[1])
    features, labels = features.cpu().double(), labels.cpu()
    number = labels.bincount(minlength=len(counts))
    counts += number
    for label in number.nonzero().flatten().tolist():
        own = features[labels == label]
        sums[label] += own.sum(0)
        products[label] += (own.T @ own)[rows, columns]


def whole(triangle: Tensor, size: int) -> Tensor:
    """Return the symmetric matrix (D, D) with a given upper triangle."""
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_zeros(size, size)
    matrix[rows, columns] = matrix[columns, rows] = triangle
    return matrix


def impossible(count: int, sums: Tensor, products: Tensor) -> str | None:
    """Return why these cannot be sums of features, or None.

    Args:
        count: Number of features.
        sums: Sum of the features, shape (D,).
        products: Upper triangle of the sum of their products, shape (D (D + 1) / 2,).
    """
    if count == 0:
        return "they are not 0" if sums.any() or products.any() else None
    matrix = whole(products, len(sums))
    squares = matrix.diagonal()
    if (squares < 0).any():
        return "a sum of squares is below 0"
    if (squares > count * MAX_FEATURE**2).any():
        return "a sum of squares is beyond those of float32"
    slack = ROUNDING * squares
    scatter = matrix - sums[:, None] / count * sums
    variances = scatter.diagonal()
    if (variances < -slack).any():
        return "a variance is below 0"
    bounds = (variances.clamp(min=0) + slack).sqrt()
    if (scatter.abs() > bounds[:, None] * bounds).any():
        return "a covariance is larger than the variances allow"
    return None


def pooled(count: int, sums: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased covariance of features, given their sums.

    Args:
        count: Number N of features; for a single one the covariance is 0.
        sums: Sum of the features, shape (D,).
        products: Upper triangle of the sum of their products, shape (D (D + 1) / 2,).

    Returns:
        ``mu = sums / N`` of shape (D,), ``(products - N mu mu^T) / (N - 1)`` of shape (D, D).
    """
    mean = sums / count
    covariance = (whole(products, len(sums)) - mean[:, None] * sums) / max(count - 1, 1)
    return mean, covariance if count > 1 else torch.zeros_like(covariance)


def drawn(mean: Tensor, covariance: Tensor, num_features: int, generator: torch.Generator) -> Tensor:
    """Draw from a Gaussian after setting negative eigenvalues of its covariance to 0 and adding 1e-6 to all of them.

    It uses the symmetric square root of the covariance, which rounding changes little; eigenvectors alone may rotate.

    Args:
        mean: Shape (D,).
        covariance: Shape (D, D).
        num_features: Number of draws.
        generator: Source of the draws.

    Returns:
        Shape (num_features, D).
    """
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(num_features, len(mean), generator=generator, dtype=mean.dtype)
    result: Tensor = mean + noise @ (vectors * (values.clamp(min=0) + 1e-6).sqrt() @ vectors.T)
    return result
