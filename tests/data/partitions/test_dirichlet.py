"""Dirichlet partitions in blocks, and with clients of equal size: the rules themselves, their moments and their limits."""

from functools import partial

import numpy as np
import pytest

from fedamm_pl.data.partitions import dirichlet as dirichlet_partitions
from fedamm_pl.data.partitions.dirichlet import by_dirichlet_balanced, by_dirichlet_blocks
from fedamm_pl.data.partitions.simulated import class_histogram
from tests.data.partitions.test_simulated import LONG_TAIL, SHAPES, Partition, labels_of, rng, sizes, used


def plain_blocks(labels: list[int], num_clients: int, rng: np.random.Generator, alpha: float) -> list[list[int]]:
    """The rule as it is written down: one example at a time, with the same draws."""
    order = rng.permutation(len(labels)).tolist()
    num_blocks = -(-num_clients // 10)
    size = 10 * len(labels) // num_clients
    clients: list[list[int]] = []
    for number in range(num_blocks):
        last = number == num_blocks - 1
        block = order[number * size :] if last else order[number * size : (number + 1) * size]
        m = num_clients - 10 * number if last else 10
        while True:
            held: list[list[int]] = [[] for _ in range(m)]
            for label in sorted({labels[example] for example in block}):
                mine = [example for example in block if labels[example] == label]
                p = rng.dirichlet([alpha] * m).tolist()
                p = [0.0 if len(held[j]) >= len(block) / m else p[j] for j in range(m)]
                total = sum(p)
                cut = 0
                for j in range(m):
                    end = len(mine) if j == m - 1 else int(sum(p[: j + 1]) / total * len(mine))
                    held[j] += mine[cut:end]
                    cut = end
            if min(map(len, held)) >= int(0.5 * len(block) / m):
                break
        clients += [sorted(mine) for mine in held]
    return clients


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("counts", "num_clients"), [*SHAPES, (LONG_TAIL, 20), ([40, 20, 10], 23), ([9, 9, 9], 11)])
def test_blocks_equal_a_plain_implementation(counts: list[int], num_clients: int, seed: int) -> None:
    labels = labels_of(counts, seed)
    expected = plain_blocks(labels.tolist(), num_clients, rng(seed), 0.7)
    assert [mine.tolist() for mine in by_dirichlet_blocks(labels, num_clients, rng(seed), alpha=0.7)] == expected


def test_blocks_of_a_seed() -> None:
    histogram = class_histogram(labels_of([60, 30, 12]), by_dirichlet_blocks(labels_of([60, 30, 12]), 12, rng(1)), 3)
    assert histogram.tolist() == [
        [0, 10, 0],
        [2, 2, 0],
        [3, 0, 7],
        [14, 0, 0],
        [3, 2, 0],
        [6, 3, 0],
        [1, 8, 0],
        [8, 1, 0],
        [8, 0, 1],
        [2, 1, 3],
        [9, 0, 0],
        [4, 3, 1],
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_clients", [1, 7, 10, 11, 20, 35])
def test_blocks_serve_ten_clients_each_with_their_part_of_the_examples(num_clients: int, seed: int) -> None:
    found = sizes(by_dirichlet_blocks(labels_of(LONG_TAIL), num_clients, rng(seed)))
    assert sum(found) == sum(LONG_TAIL)
    per_client = sum(LONG_TAIL) / num_clients
    for start in range(0, num_clients, 10):
        block = found[start : start + 10]
        assert sum(block) == pytest.approx(per_client * len(block), abs=num_clients)
        assert min(block) >= int(0.5 * per_client)


def test_a_client_with_its_part_gets_no_further_class() -> None:
    labels = labels_of([500, 500])
    for seed in range(20):
        histogram = class_histogram(labels, by_dirichlet_blocks(labels, 2, rng(seed), alpha=1.0), 2)
        (full,) = np.flatnonzero(histogram[:, 0] >= 500) if histogram[:, 0].max() >= 500 else (None,)
        assert full is None or histogram[full, 1] == 0


def test_blocks_of_a_large_alpha_are_even() -> None:
    labels = labels_of([200, 100, 40])
    histogram = class_histogram(labels, by_dirichlet_blocks(labels, 10, rng(), alpha=1e9), 3)
    assert np.abs(histogram - [20, 10, 4]).max() <= 1


def test_blocks_are_drawn_anew_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirichlet_partitions, "MAX_BLOCK_REDRAWS", 30)
    message = (
        r"Expected `dirichlet_alpha` to leave every client at least half of an equal part of its block \(20 examples\), got "
        r"none such in 30 draws with alpha 0.001, 5 clients and 200 examples in a block: raise the alpha, or change"
    )
    with pytest.raises(ValueError, match=message):
        by_dirichlet_blocks(labels_of([100, 100]), 5, rng(), alpha=0.001)


@pytest.mark.parametrize("split", [by_dirichlet_blocks, by_dirichlet_balanced])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(split: Partition, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"`dirichlet_alpha` to be a number above 0, got {alpha}"):
        split(labels_of([6, 6]), 3, rng(), alpha=alpha)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [1e-320, 0.01, 0.5, 10.0, 1e308])
@pytest.mark.parametrize(("counts", "num_clients"), [*SHAPES, (LONG_TAIL, 20)])
def test_balanced_clients_are_equally_large(counts: list[int], num_clients: int, alpha: float, seed: int) -> None:
    labels = labels_of(counts, seed)
    clients = by_dirichlet_balanced(labels, num_clients, rng(seed), alpha=alpha)
    assert sizes(clients) == [len(labels) // num_clients] * num_clients
    assert len(labels) - len(used(clients)) == len(labels) % num_clients


def test_balanced_of_a_seed() -> None:
    clients = by_dirichlet_balanced(labels_of([60, 30, 12]), 5, rng(1))
    assert class_histogram(labels_of([60, 30, 12]), clients, 3).tolist() == [
        [18, 2, 0],
        [20, 0, 0],
        [20, 0, 0],
        [0, 16, 4],
        [0, 12, 8],
    ]


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_first_balanced_client_has_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    labels = labels_of([3000, 1000])
    split = partial(by_dirichlet_balanced, labels, 8, alpha=alpha)
    shares = [1 - labels[split(rng(seed))[0]].mean() for seed in range(600)]
    assert np.mean(shares) == pytest.approx(0.75, abs=0.03)
    # Beta(0.75 alpha, 0.25 alpha), and drawing 500 examples by it
    variance = 0.75 * 0.25 / (alpha + 1)
    assert np.var(shares) == pytest.approx(variance + (0.75 * 0.25 - variance) / 500, rel=0.15)


def test_balanced_clients_of_a_small_alpha_hold_one_class_while_there_is_enough() -> None:
    labels = labels_of([1000] * 5)
    histogram = class_histogram(labels, by_dirichlet_balanced(labels, 50, rng(), alpha=1e-9), 5)
    assert np.count_nonzero(histogram[:10], axis=1).max() == 1
    assert histogram.sum(0).tolist() == [1000] * 5  # 50 clients of 100 use everything up


def test_balanced_clients_of_a_large_alpha_draw_from_the_whole_training_set() -> None:
    labels = labels_of([600, 300, 100])
    histogram = class_histogram(labels, by_dirichlet_balanced(labels, 5, rng(), alpha=1e9), 3)
    assert np.abs(histogram - [120, 60, 20]).max() < 30


def test_a_class_that_is_used_up_is_not_drawn_and_the_others_keep_their_ratio() -> None:
    drawn = dirichlet_partitions._drawn_counts(np.array([0.6, 0.3, 0.1]), np.array([10, 5000, 5000]), 4000, rng())
    assert drawn[0] == 10
    assert drawn.sum() == 4000
    assert drawn[1] / drawn[2] == pytest.approx(3, rel=0.1)


def test_where_the_proportions_have_nothing_left_all_other_classes_are_drawn_by_what_is_left_of_them() -> None:
    drawn = dirichlet_partitions._drawn_counts(np.array([1.0, 0.0, 0.0]), np.array([10, 6000, 2000]), 4010, rng())
    assert drawn[0] == 10
    assert drawn[1] / drawn[2] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("num_clients", [20, 100])
def test_balanced_clients_leave_the_unused_examples_of_all_classes(num_clients: int) -> None:
    labels = labels_of(LONG_TAIL)
    kept = class_histogram(labels, by_dirichlet_balanced(labels, num_clients, rng()), 10).sum(0) / LONG_TAIL
    assert kept.min() > 0.8  # the rarest classes would pay for all, were the rest what is left at the end
