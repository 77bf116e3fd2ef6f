"""What clients hold out of training: how many, of which classes, and that nothing else depends on it."""

import logging
from itertools import pairwise

import numpy as np
import pytest

from fedamm_pl.data.local_test import hold_out
from fedamm_pl.data.long_tail import Indices

NAMES = list("abcde")


def drawn(sizes: list[list[int]], fraction: float, seed: int = 0) -> tuple[np.ndarray, list[Indices], list[Indices]]:
    """Clients with so many examples of each class, dealt in mixed order; labels, training and local test indices."""
    labels = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in sizes])
    ends = np.cumsum([0, *(sum(counts) for counts in sizes)])
    clients = [np.arange(start, end) for start, end in pairwise(ends)]
    return labels, *hold_out(clients, labels, NAMES, fraction, seed)


@pytest.mark.parametrize(
    ("size", "fraction", "held"),
    [
        (10, 0.2, 2),
        (10, 0.25, 3),  # 2.5 is rounded up
        (10, 0.24, 2),
        (2, 0.01, 1),  # at least one
        (2, 0.99, 1),  # never all
        (1, 0.5, 0),  # a single example is for training
        (0, 0.5, 0),
        (10, 0.99, 9),
        (3, 0.5, 2),
    ],
)
def test_how_many_by_hand(size: int, fraction: float, held: int) -> None:
    _, train, test = drawn([[size, 0], [4, 4]], fraction)
    assert (len(train[0]), len(test[0])) == (size - held, held)


@pytest.mark.parametrize("seed", range(20))
def test_each_class_gives_its_share(seed: int) -> None:
    """A fifth of 30, 11, 7 and 2 examples is 6, 2.2, 1.4 and 0.4; a fifth of 50 is 10."""
    labels, _, (held,) = drawn([[30, 11, 7, 2]], 0.2, seed)
    counts = np.bincount(labels[held], minlength=4).tolist()
    assert sum(counts) == 10
    assert counts[0] in (5, 6, 7)
    assert all(count in (int(share), int(share) + 1) for count, share in zip(counts[1:], (2.2, 1.4, 0.4), strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_or_given_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, (12, 5)).tolist()
    labels, train, test = drawn(sizes, float(rng.uniform(0.01, 0.99)), seed)
    for mine, held, counts in zip(train, test, sizes, strict=True):
        assert not set(mine) & set(held)
        assert sorted([*mine, *held]) == list(
            range(min([*mine, *held], default=0), max([*mine, *held], default=-1) + 1)
        )
        assert len(mine) + len(held) == sum(counts)
        assert list(mine) == sorted(mine)
        assert list(held) == sorted(held)
        assert len(mine) >= min(1, sum(counts))
        assert bool(len(held)) == (sum(counts) > 1)
    assert sum(map(len, train)) + sum(map(len, test)) == len(labels)


def test_every_example_is_as_likely_as_any_other() -> None:
    """Each of 14 examples with probability 4 / 14; of 2,000 draws 571 on average, with a deviation of 20."""
    times = np.zeros(14)
    for seed in range(2000):
        times[drawn([[9, 4, 1]], 0.3, seed)[2][0]] += 1
    assert np.abs(times - 2000 * 4 / 14).max() < 5 * np.sqrt(2000 * 4 / 14 * 10 / 14)


def test_a_client_draws_by_seed_and_its_own_examples_alone() -> None:
    (_, _, first), (_, _, same), (_, _, other) = (drawn([[9, 4], [5, 5]], 0.3, seed) for seed in (0, 0, 1))
    assert [held.tolist() for held in first] == [held.tolist() for held in same]
    assert [held.tolist() for held in first] != [held.tolist() for held in other]
    _, _, alone = drawn([[9, 4], [70, 1]], 0.3)
    assert alone[0].tolist() == first[0].tolist()


def test_without_a_fraction_nothing_happens() -> None:
    _, train, test = drawn([[9, 4], [5, 5]], 0)
    assert [mine.tolist() for mine in train] == [list(range(13)), list(range(13, 23))]
    assert test == []


def test_a_class_that_nobody_trains_on_any_more_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for seed in range(50):
            labels, (mine,), _ = drawn([[1, 1]], 0.5, seed)
            lost = NAMES[1 - labels[mine[0]]]
            assert f"no client trains on class {lost} any more" in caplog.records[-1].getMessage()
