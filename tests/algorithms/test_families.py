"""Families of classes of like size: exact one-dimensional K-means, and the shot groups."""

import itertools

import pytest
import torch
from torch import Tensor

from fedamm_pl.algorithms.meta.families import families_by_size, families_of_groups

LONG_TAIL = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


@pytest.mark.parametrize(
    ("num_families", "log", "expected"),
    [
        (3, False, [2, 1, 1, 0, 0, 0, 0, 0, 0, 0]),  # {5000}, {2997, 1796}, the rest
        (3, True, [2, 2, 2, 1, 1, 1, 0, 0, 0, 0]),  # an exponential tail is a straight line
        (2, False, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        (1, False, [0] * 10),
        (20, False, list(range(9, -1, -1))),
    ],
)
def test_families_of_cifar_10_lt(num_families: int, log: bool, expected: list[int]) -> None:
    assert families_by_size(LONG_TAIL, num_families, log).tolist() == expected


def spread(counts: Tensor, families: Tensor) -> float:
    """Sum of squared distances from the means of the families."""
    parts = [counts[families == family].double() for family in families.unique()]
    return sum(float((part - part.mean()).square().sum()) for part in parts)


def test_families_are_the_best_of_all_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        counts = torch.randint(0, 30, (7,), generator=generator)
        num_families = int(torch.randint(1, 5, (1,), generator=generator))
        distinct = counts.unique()
        found = families_by_size(counts, num_families)
        size = min(num_families, len(distinct))
        assert found.unique().tolist() == list(range(size))
        means = torch.stack([counts[found == family].double().mean() for family in range(size)])
        assert means.diff().gt(0).all()  # the smallest classes first
        places = torch.searchsorted(distinct, counts)
        every = (
            torch.bucketize(places, torch.tensor(cuts, dtype=torch.int64), right=True)
            for cuts in itertools.combinations(range(1, len(distinct)), size - 1)
        )
        assert spread(counts, found) == pytest.approx(min(spread(counts, families) for families in every), abs=1e-9)


def test_there_are_no_more_families_than_distinct_counts() -> None:
    assert families_by_size(torch.tensor([4, 4, 4]), 3).tolist() == [0, 0, 0]
    assert families_by_size(torch.tensor([0, 7, 0, 7]), 3).tolist() == [0, 1, 0, 1]


def test_equal_counts_are_in_one_family_and_weigh_as_many() -> None:
    # {0, 4}, {9} costs 8 and {0}, {4, 9} 12.5; ten zeros with the 5 would cost 22.7, the 5 with the 9 costs 8
    assert families_by_size(torch.tensor([0, 4, 9]), 2).tolist() == [0, 0, 1]
    assert families_by_size(torch.tensor([0] * 10 + [5, 9]), 2).tolist() == [0] * 10 + [1, 1]


def test_shot_groups_make_families_by_their_mean_size() -> None:
    groups = {"many": [3], "medium": [], "few": [0, 1], "none": [2]}
    assert families_of_groups(groups, [5, 7, 0, 100]).tolist() == [1, 1, 0, 2]
    for wrong in ({"many": [0]}, {"many": [0, 1], "few": [1]}):
        with pytest.raises(ValueError, match="shot_groups with each of 2 classes once"):
            families_of_groups(wrong, [5, 7])
