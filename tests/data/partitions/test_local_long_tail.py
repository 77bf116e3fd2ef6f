"""A long tail at each client, in an order of its own: proportions, limits, and what is refused."""

import numpy as np
import pytest

from fedamm_pl.data.partitions import local_long_tail
from fedamm_pl.data.partitions.local_long_tail import by_local_long_tail
from fedamm_pl.data.partitions.simulated import class_histogram
from tests.data.partitions.test_simulated import LONG_TAIL, labels_of, rng, sizes, used


def plain_local_long_tail(
    labels: list[int], num_clients: int, rng: np.random.Generator, factor: float
) -> list[list[int]]:
    """The same partition, written for reading, with the same draws; any size of a client will do."""
    classes = sorted(set(labels))
    members = [rng.permutation([i for i, label in enumerate(labels) if label == c]).tolist() for c in classes]
    tail = [factor ** (rank / max(len(classes) - 1, 1)) for rank in range(len(classes))]
    weights = rng.permuted([tail] * num_clients, axis=1).tolist()
    clients: list[list[int]] = [[] for _ in range(num_clients)]
    for c, mine in enumerate(members):
        column, start, cumulated = [weights[k][c] for k in range(num_clients)], 0, 0.0
        for k in rng.permutation(num_clients):
            cumulated += column[k] / sum(column)
            end = round(cumulated * len(mine))
            clients[k] += mine[start:end]
            start = end
    return [sorted(mine) for mine in clients]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [0.01, 0.1, 0.7])
def test_equals_a_plain_implementation(factor: float, seed: int) -> None:
    labels = labels_of([60, 31, 17, 8], seed)
    clients = by_local_long_tail(labels, 5, rng(seed), local_imbalance_factor=factor, min_size=0)
    assert [mine.tolist() for mine in clients] == plain_local_long_tail(labels.tolist(), 5, rng(seed), factor)


def test_clients_of_a_seed() -> None:
    clients = by_local_long_tail(labels_of([60, 30, 12]), 4, rng(1), local_imbalance_factor=0.25)
    assert class_histogram(labels_of([60, 30, 12]), clients, 3).tolist() == [
        [8, 6, 5],
        [8, 6, 5],
        [14, 12, 1],
        [30, 6, 1],
    ]


def test_a_client_has_a_long_tail_over_classes_that_are_equally_large() -> None:
    labels = labels_of([20000] * 4)
    histogram = class_histogram(labels, by_local_long_tail(labels, 40, rng(), local_imbalance_factor=0.01), 4)
    orders = {tuple(np.argsort(-row)) for row in histogram}
    assert len(orders) > 10  # of 24
    ratios = (np.sort(histogram, axis=1)[:, ::-1] / histogram.max(1, keepdims=True)).mean(0)
    assert ratios == pytest.approx([1, 0.01 ** (1 / 3), 0.01 ** (2 / 3), 0.01], rel=0.2)


def test_local_order_differs_from_the_global_one() -> None:
    labels = labels_of(LONG_TAIL)
    histogram = class_histogram(labels, by_local_long_tail(labels, 20, rng(), local_imbalance_factor=0.01), 10)
    assert histogram.sum(0).tolist() == LONG_TAIL
    assert len(set(histogram.argmax(1).tolist())) > 1


@pytest.mark.parametrize(("counts", "num_clients"), [(LONG_TAIL, 20), ([7, 7, 7], 3), ([9], 2), ([5, 1], 6)])
def test_limit_1_gives_every_client_an_equal_part_of_each_class(counts: list[int], num_clients: int) -> None:
    labels = labels_of(counts)
    clients = by_local_long_tail(labels, num_clients, rng(), local_imbalance_factor=1.0, min_size=0)
    assert np.abs(class_histogram(labels, clients, len(counts)) - np.array(counts) / num_clients).max() < 1


def test_what_does_not_divide_goes_to_other_clients_for_each_class() -> None:
    labels = labels_of([3] * 30)
    found = sizes(by_local_long_tail(labels, 6, rng(), local_imbalance_factor=1.0, min_size=0))
    assert min(found) > 5  # 15 expected; the same three clients would get all 90


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_size", [0, 1, 15])
def test_everything_is_held_and_the_smallest_size_kept(min_size: int, seed: int) -> None:
    labels = labels_of([60, 37, 20, 9], seed)
    clients = by_local_long_tail(labels, 6, rng(seed), local_imbalance_factor=0.05, min_size=min_size)
    assert sorted(used(clients).tolist()) == list(range(len(labels)))
    assert min(sizes(clients)) >= min_size


def test_a_size_that_no_draw_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_long_tail, "MAX_REDRAWS", 30)
    message = (
        "Expected `local_imbalance_factor` to leave every client at least `min_client_size` = 5 examples, got none such in 30 "
        "draws with factor 0.1, 3 clients and 12 examples: raise the factor, or lower the size or the number of clients"
    )
    with pytest.raises(ValueError, match=message):
        by_local_long_tail(labels_of([6, 6]), 3, rng(), min_size=5)


@pytest.mark.parametrize("factor", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_factor_out_of_range_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"`local_imbalance_factor` to be in \(0, 1\], got {factor}"):
        by_local_long_tail(labels_of([6, 6]), 3, rng(), local_imbalance_factor=factor)


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="`min_client_size` to be 0 or more, got -1"):
        by_local_long_tail(labels_of([6, 6]), 3, rng(), min_size=-1)
