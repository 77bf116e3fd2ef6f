"""Families of classes of similar size, for a weight net with an output for each: exact K-means on the class counts."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def families_by_size(class_counts: Tensor, num_families: int, log: bool = False) -> Tensor:
    """Group classes into families by exact one-dimensional K-means on their numbers of examples.

    In one dimension the best clusters are intervals, so dynamic programming over the sorted distinct counts finds them.
    There is no random start, so the same counts give the same families everywhere. Of equally good partitions the one
    with the smaller first families is used.

    Args:
        class_counts: Number of examples of each class, shape (C,).
        num_families: Number of families F; there are fewer if there are fewer distinct counts.
        log: Whether to compare log(1 + n) instead of n.

    Returns:
        Family of each class, shape (C,), int64; family 0 has the smallest classes.

    Example:
        >>> families_by_size(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]), 3)
        tensor([2, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    """
    counts = class_counts.cpu().double()
    distinct, places, sizes = torch.unique(counts, return_inverse=True, return_counts=True)
    values = distinct.log1p() if log else distinct
    ends = _ends(values - values.mean(), sizes, min(num_families, len(values)))
    families = torch.bucketize(torch.arange(len(values)), torch.tensor(ends, dtype=torch.int64), right=True)
    return families[places].to(class_counts.device)


def _ends(values: Tensor, sizes: Tensor, count: int) -> list[int]:
    """Split increasing values into intervals with the least sum of squared distances from the interval means.

    Args:
        values: Values of shape (n,), float64.
        sizes: Number of times that each value occurs, shape (n,).
        count: Number of intervals, 1 to n.

    Returns:
        The ends of all intervals but the last.
    """
    # prefix sums, for the spread of an interval: sum of squares minus squared sum divided by the number
    number, total, squares = (
        torch.cat([torch.zeros(1).double(), (sizes * power).cumsum(0)])
        for power in (torch.ones_like(values), values, values.square())
    )
    least, cuts = torch.full((len(values) + 1,), math.inf).double(), []
    least[0] = 0
    for _ in range(count):
        row, cut = torch.full_like(least, math.inf), [0] * (len(values) + 1)
        for end in range(1, len(values) + 1):
            n, x, x2 = (sums[end] - sums[:end] for sums in (number, total, squares))
            costs = least[:end] + (x2 - x.square() / n).clamp(min=0)
            cut[end] = int(costs.argmin())
            row[end] = costs[cut[end]]
        least = row
        cuts.append(cut)
    ends, end = [], len(values)
    for cut in cuts[:0:-1]:
        end = cut[end]
        ends.append(end)
    return ends[::-1]


def families_of_groups(groups: Mapping[str, Sequence[int]], class_counts: Sequence[int]) -> Tensor:
    """Make a family of each non-empty group of classes, in increasing order of mean class size.

    Args:
        groups: Maps the name of a group to its classes.
        class_counts: Number of examples of each class.

    Returns:
        Family of each class, shape (C,), int64.

    Raises:
        ValueError: If a class is in no group or in several.

    Example:
        >>> families_of_groups({"many": [0], "medium": [], "few": [1, 2]}, [9, 2, 1])
        tensor([1, 0, 0])
    """
    if sorted(label for members in groups.values() for label in members) != list(range(len(class_counts))):
        raise ValueError(
            f"Expected `info` to hold shot_groups with each of {len(class_counts)} classes once, got others."
        )
    filled = [members for members in groups.values() if members]
    filled.sort(key=lambda members: sum(class_counts[label] for label in members) / len(members))
    family = torch.zeros(len(class_counts), dtype=torch.int64)
    for index, members in enumerate(filled):
        family[list(members)] = index
    return family
