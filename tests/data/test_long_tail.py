"""Long tails: the class counts that papers print, and the balanced meta set."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedamm_pl.data.long_tail import long_tail_counts, long_tail_split

CIFAR10 = np.repeat(np.arange(10), 5000)
CIFAR100 = np.repeat(np.arange(100), 500)
LABELS = np.tile(np.arange(5), 40)  # 40 examples a class


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def exact_counts(num_classes: int, largest: int, factor: Fraction) -> list[int]:
    """Largest n with n <= largest * factor^(i / (C - 1)), decided in whole numbers: n^(C-1) <= largest^(C-1) factor^i."""
    power = num_classes - 1
    return [
        max(n for n in range(largest + 1) if Fraction(n) ** power <= Fraction(largest) ** power * factor**rank)
        for rank in range(num_classes)
    ]


@pytest.mark.parametrize(
    ("num_meta_per_class", "expected"),
    [
        (10, [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]),
        (0, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),  # as in LDAM (Cao et al., NeurIPS 2019)
    ],
)
def test_cifar10_counts_are_the_published_ones(num_meta_per_class: int, expected: list[int]) -> None:
    split = long_tail_split(CIFAR10, 10, rng(), num_meta_per_class=num_meta_per_class, imbalance_factor=0.01)
    assert split.class_counts == expected
    assert np.bincount(CIFAR10[split.train]).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "imbalance_factor", "total"),
    [
        (CIFAR10, 0.01, 12380),
        (CIFAR10, 0.02, 13967),
        (CIFAR10, 0.1, 20391),
        (CIFAR100, 0.01, 10626),
        (CIFAR100, 0.02, 12354),
        (CIFAR100, 0.1, 19183),
    ],
)
def test_totals_are_the_published_ones(labels: np.ndarray, imbalance_factor: float, total: int) -> None:
    num_classes = int(labels.max()) + 1
    split = long_tail_split(labels, num_classes, rng(), num_meta_per_class=10, imbalance_factor=imbalance_factor)
    assert len(split.train) == sum(split.class_counts) == total


@pytest.mark.parametrize("factor", ["0.01", "0.02", "0.1", "0.5", "1"])
@pytest.mark.parametrize(("num_classes", "largest"), [(2, 300), (7, 490), (10, 340)])
def test_exponential_counts_equal_exact_arithmetic(num_classes: int, largest: int, factor: str) -> None:
    counts = long_tail_counts(num_classes, largest, float(factor), "exponential")
    assert counts == exact_counts(num_classes, largest, Fraction(factor))


def test_one_class_keeps_all() -> None:
    assert long_tail_counts(1, 7, 0.01, "exponential") == [7]


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(10, [4990] * 5 + [49] * 5), (5, [4990] * 2 + [49] * 3), (2, [4990, 49])]
)
def test_step_keeps_the_first_half_of_the_ranks(num_classes: int, expected: list[int]) -> None:
    assert long_tail_counts(num_classes, 4990, 0.01, "step") == expected


def test_step_split_has_the_step_counts() -> None:
    split = long_tail_split(LABELS, 5, rng(), num_meta_per_class=4, imbalance_factor=0.25, profile="step")
    assert split.class_counts == np.bincount(LABELS[split.train]).tolist() == [36, 36, 9, 9, 9]


def test_profile_none_keeps_every_image_but_the_meta_set() -> None:
    labels = np.repeat([0, 1, 2], [9, 30, 4])
    split = long_tail_split(labels, 3, rng(), num_meta_per_class=3, profile="none")
    assert split.class_counts == [6, 27, 1]
    assert sorted([*split.train, *split.meta]) == list(range(43))


def test_a_class_keeps_no_more_than_it_has() -> None:
    labels = np.repeat([0, 1, 2], [12, 100, 8])  # N = 120, m = 2: largest = (120 - 6) / 3 = 38
    split = long_tail_split(labels, 3, rng(), num_meta_per_class=2, imbalance_factor=0.25)
    assert split.class_counts == [10, 19, 6]  # min(10, 38), min(98, 19), min(6, 9.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_meta_per_class", [0, 1, 7])
def test_meta_set_is_balanced_and_disjoint(seed: int, num_meta_per_class: int) -> None:
    labels = rng(seed).permutation(LABELS)
    split = long_tail_split(labels, 5, rng(seed), num_meta_per_class=num_meta_per_class, imbalance_factor=0.2)
    assert labels[split.meta].tolist() == np.repeat(np.arange(5), num_meta_per_class).tolist()
    everything = np.concatenate([split.train, split.meta])
    assert len(set(everything.tolist())) == len(everything)
    assert split.train.tolist() == sorted(split.train.tolist())
    assert np.bincount(labels[split.train]).tolist() == split.class_counts


def test_split_is_seeded() -> None:
    first, same, other = (long_tail_split(LABELS, 5, rng(seed), imbalance_factor=0.2) for seed in (0, 0, 1))
    assert np.array_equal(first.train, same.train)
    assert np.array_equal(first.meta, same.meta)
    assert not np.array_equal(first.train, other.train)
    assert not np.array_equal(first.meta, other.meta)


def test_every_example_can_come_into_each_set() -> None:
    labels = np.repeat([0, 1], 6)
    splits = [long_tail_split(labels, 2, rng(seed), num_meta_per_class=1, imbalance_factor=0.5) for seed in range(100)]
    assert {int(index) for split in splits for index in split.meta} == set(range(12))
    assert {int(index) for split in splits for index in split.train} == set(range(12))


def test_shuffled_ranks_are_a_seeded_permutation_of_the_counts() -> None:
    plain = long_tail_split(LABELS, 5, rng(), imbalance_factor=0.2)
    shuffled = [long_tail_split(LABELS, 5, rng(s), imbalance_factor=0.2, shuffle_ranks=True) for s in range(30)]
    orders = {tuple(split.class_counts) for split in shuffled}
    assert all(sorted(order, reverse=True) == plain.class_counts for order in orders)
    assert {order.index(max(order)) for order in orders} == set(range(5))
    again = long_tail_split(LABELS, 5, rng(7), imbalance_factor=0.2, shuffle_ranks=True)
    assert again.class_counts == shuffled[7].class_counts
    assert np.bincount(LABELS[again.train]).tolist() == again.class_counts


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_ranks_follow_the_sizes_of_the_classes_by_option(profile: Any) -> None:
    labels = np.repeat(np.arange(5), [40, 90, 60, 90, 20])  # m = 0: largest = 300 / 5 = 60
    counts = long_tail_counts(5, 60, 0.1, profile)
    split = long_tail_split(
        labels, 5, rng(), num_meta_per_class=0, imbalance_factor=0.1, profile=profile, ranks_by_size=True
    )
    ranks = [3, 0, 2, 1, 4]  # of two equal classes the first goes before
    assert split.class_counts == [
        min(int(size), counts[rank]) for size, rank in zip(np.bincount(labels), ranks, strict=True)
    ]
    assert np.bincount(labels[split.train]).tolist() == split.class_counts


def test_ranks_by_size_of_equal_classes_are_those_by_index() -> None:
    plain, by_size = (long_tail_split(CIFAR10, 10, rng(), ranks_by_size=by_size) for by_size in (False, True))
    assert np.array_equal(plain.train, by_size.train)
    assert np.array_equal(plain.meta, by_size.meta)


def test_ranks_are_by_chance_or_by_size_not_both() -> None:
    with pytest.raises(ValueError, match="Expected `shuffle_ranks` and `ranks_by_size` not to be given both, got true"):
        long_tail_split(LABELS, 5, rng(), shuffle_ranks=True, ranks_by_size=True)


def test_labels_are_left_as_they_are() -> None:
    labels = LABELS.copy()
    long_tail_split(labels, 5, rng(), imbalance_factor=0.2, shuffle_ranks=True)
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("factor", [0.0, -0.1, 1.001, float("nan"), float("inf")])
@pytest.mark.parametrize("profile", ["exponential", "step", "none"])
def test_imbalance_factor_outside_0_to_1_is_refused(factor: float, profile: str) -> None:
    with pytest.raises(ValueError, match=r"Expected `imbalance_factor` to be in \(0, 1\], got"):
        long_tail_counts(10, 100, factor, profile)  # type: ignore[arg-type]


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `imbalance_profile` to be exponential, step or none, got 'linear'"):
        long_tail_counts(10, 100, 0.1, "linear")  # type: ignore[arg-type]


def test_negative_meta_size_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `num_meta_per_class` to be 0 or more, got -1"):
        long_tail_split(LABELS, 5, rng(), num_meta_per_class=-1)


@pytest.mark.parametrize(("names", "shown"), [(None, "1"), (["ant", "bee", "cat"], "bee")])
def test_class_smaller_than_its_meta_share_is_refused_by_name(names: list[str] | None, shown: str) -> None:
    labels = np.repeat([0, 1, 2], [20, 4, 20])
    with pytest.raises(
        ValueError, match=rf"at least num_meta_per_class \+ 1 = 5 training examples, got 4 for class {shown}"
    ):
        long_tail_split(labels, 3, rng(), num_meta_per_class=4, class_names=names)
    assert min(long_tail_split(labels, 3, rng(), num_meta_per_class=3, imbalance_factor=1).class_counts) == 1


def test_class_without_any_example_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 for class 2"):
        long_tail_split(np.array([0, 1]), 3, rng(), num_meta_per_class=0)


def test_tail_cut_down_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave every class at least 1 training example, got 0\.02 with 40 examples"):
        long_tail_split(LABELS, 5, rng(), num_meta_per_class=0, imbalance_factor=0.02)


# The validation set


def test_validation_set_by_hand() -> None:
    """CIFAR-10 with m = 10 and v = 40: n_max = (50000 - 50 * 10) / 10 = 4950, then int(4950 * 0.01^(i / 9))."""
    split = long_tail_split(CIFAR10, 10, rng(), num_meta_per_class=10, num_val_per_class=40, imbalance_factor=0.01)
    assert split.class_counts == [4950, 2967, 1778, 1066, 639, 383, 229, 137, 82, 49]
    assert CIFAR10[split.validation].tolist() == np.repeat(np.arange(10), 40).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_training_meta_and_validation_set_are_disjoint_and_the_meta_set_stays(seed: int) -> None:
    labels = rng(seed).permutation(LABELS)
    without, split, again = (
        long_tail_split(labels, 5, rng(seed), num_meta_per_class=3, num_val_per_class=number, imbalance_factor=0.2)
        for number in (0, 4, 4)
    )
    everything = np.concatenate([split.train, split.meta, split.validation])
    assert len(set(everything.tolist())) == len(everything)
    assert np.bincount(labels[split.validation]).tolist() == [4] * 5
    assert np.array_equal(without.meta, split.meta)
    assert len(without.validation) == 0
    assert np.array_equal(split.validation, again.validation)


def test_class_smaller_than_its_meta_and_validation_share_is_refused() -> None:
    labels = np.repeat([0, 1, 2], [20, 5, 20])
    message = (
        r"at least num_meta_per_class \+ num_val_per_class \+ 1 = 6 training examples, got 5 for class 1: "
        "lower `num_meta_per_class` or `num_val_per_class` or leave the class out"
    )
    with pytest.raises(ValueError, match=message):
        long_tail_split(labels, 3, rng(), num_meta_per_class=2, num_val_per_class=3)
    with pytest.raises(ValueError, match="Expected `num_val_per_class` to be 0 or more, got -1"):
        long_tail_split(labels, 3, rng(), num_meta_per_class=2, num_val_per_class=-1)


def test_the_largest_class_may_be_given() -> None:
    labels = np.repeat(np.arange(10), 6000)
    options: dict[str, Any] = {"num_meta_per_class": 10, "num_val_per_class": 50, "largest_class": 1200}
    split = long_tail_split(labels, 10, np.random.default_rng(0), **options)
    # int(1200 * 0.01 ** (rank / 9))
    assert split.class_counts == [1200, 719, 431, 258, 154, 92, 55, 33, 20, 12]
    assert sum(split.class_counts) == 2974
    assert (len(split.meta), len(split.validation)) == (100, 500)


@pytest.mark.parametrize(("profile", "largest"), [("none", 5), ("exponential", 0), ("step", 99)])
def test_the_largest_class_is_one_that_there_is(profile: Any, largest: int) -> None:
    labels = np.repeat(np.arange(4), 100)
    with pytest.raises(
        ValueError, match=r"`largest_class` to be null, or with a tail from 1 to the 98 examples .* got"
    ):
        long_tail_split(
            labels, 4, np.random.default_rng(0), num_meta_per_class=2, profile=profile, largest_class=largest
        )
