"""Partitions: what each promises, over many seeds and shapes."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from fedamm_pl.data.partitions.dirichlet import by_dirichlet_balanced, by_dirichlet_blocks
from fedamm_pl.data.partitions.local_long_tail import by_local_long_tail
from fedamm_pl.data.partitions.simulated import by_dirichlet, by_num_classes, by_shards, class_histogram, iid

Partition = Callable[..., list[np.ndarray]]
LONG_TAIL = [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]  # CIFAR-10, imbalance factor 0.01
SHAPES = [  # examples a class, clients
    ([62, 37, 22, 13, 8, 5, 3, 2, 1, 1], 7),
    ([30, 20, 5, 1], 4),
    ([20] * 10, 13),
    ([7, 7, 7], 1),
    ([2, 2, 2], 6),
    ([9], 2),
]
PARTITIONS: dict[str, Partition] = {
    "by_num_classes": partial(by_num_classes, min_classes=1),
    "by_dirichlet": partial(by_dirichlet, min_size=0),
    "by_dirichlet_blocks": by_dirichlet_blocks,
    "by_dirichlet_balanced": by_dirichlet_balanced,
    "by_local_long_tail": partial(by_local_long_tail, min_size=0),
    "by_shards": partial(by_shards, shards_per_client=1),
    "iid": iid,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def used(clients: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(clients)


def sizes(clients: list[np.ndarray]) -> list[int]:
    return [len(mine) for mine in clients]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("counts", "num_clients"), SHAPES)
@pytest.mark.parametrize("name", PARTITIONS)
def test_clients_are_disjoint_sorted_and_repeatable(name: str, counts: list[int], num_clients: int, seed: int) -> None:
    labels = labels_of(counts, seed)
    before = labels.copy()
    clients = PARTITIONS[name](labels, num_clients, rng(seed))
    everyone = used(clients)
    assert len(clients) == num_clients
    assert len(set(everyone.tolist())) == len(everyone)
    assert set(everyone.tolist()) <= set(range(len(labels)))
    assert all(mine.tolist() == sorted(mine.tolist()) and mine.dtype == np.int64 for mine in clients)
    assert np.array_equal(labels, before)
    again = PARTITIONS[name](labels, num_clients, rng(seed))
    assert all(np.array_equal(mine, same) for mine, same in zip(clients, again, strict=True))


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_seed_gives_another_partition(name: str) -> None:
    labels = labels_of([40] * 5)
    results = {tuple(map(tuple, PARTITIONS[name](labels, 4, rng(seed)))) for seed in range(5)}
    assert len(results) == 5


def plain_by_num_classes(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, min_classes: int
) -> list[list[int]]:
    """The same partition, written for reading: one example at a time, with the same draws."""
    size, free = len(labels) // num_clients, set(range(len(labels)))
    classes, clients = sorted(set(labels.tolist())), []
    for _ in range(num_clients):
        wanted = rng.integers(min_classes, len(classes) + 1)
        pool: list[int] = []
        for position, label in enumerate(rng.permutation(classes)):
            if position >= wanted and len(pool) >= size:
                break
            pool += sorted(example for example in free if labels[example] == label)
        mine = sorted(rng.choice(pool, size, replace=False).tolist())
        free -= set(mine)
        clients.append(mine)
    return clients


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("counts", "num_clients"), SHAPES)
def test_by_num_classes_equals_a_plain_implementation(counts: list[int], num_clients: int, seed: int) -> None:
    labels = labels_of(counts, seed)
    clients = by_num_classes(labels, num_clients, rng(seed), min_classes=1)
    assert [mine.tolist() for mine in clients] == plain_by_num_classes(labels, num_clients, rng(seed), 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("counts", "num_clients"), [*SHAPES, (LONG_TAIL, 20)])
def test_by_num_classes_gives_equal_sizes_and_enough_classes(counts: list[int], num_clients: int, seed: int) -> None:
    labels = labels_of(counts, seed)
    clients = by_num_classes(labels, num_clients, rng(seed), min_classes=1)
    size = len(labels) // num_clients
    assert sizes(clients) == [size] * num_clients
    assert len(labels) - len(used(clients)) == len(labels) - num_clients * size < num_clients
    left = np.array(counts)
    for histogram in class_histogram(labels, clients, len(counts)):
        needed = 1 + int(np.searchsorted(np.cumsum(np.sort(left)[::-1]), size))  # the fewest classes that hold so many
        assert np.count_nonzero(histogram) >= needed
        left = left - histogram
        assert (left >= 0).all()


@pytest.mark.parametrize("min_classes", [1, 2, 5])
def test_by_num_classes_draws_the_number_of_classes_uniformly(min_classes: int) -> None:
    labels = labels_of(
        [1000] * 5
    )  # 100 clients of 50: the classes drawn always hold enough, and 50 draws meet them all
    held = [
        np.count_nonzero(np.bincount(labels[by_num_classes(labels, 100, rng(seed), min_classes=min_classes)[0]]))
        for seed in range(60)
    ]
    values, frequencies = np.unique(held, return_counts=True)
    assert values.tolist() == list(range(min_classes, 6))
    assert frequencies.min() > 0.4 * 60 / len(values)


def test_by_num_classes_draws_examples_uniformly_from_the_classes_drawn() -> None:
    labels = labels_of([900, 100])
    share = np.mean([labels[by_num_classes(labels, 10, rng(seed))[0]].mean() for seed in range(200)])
    assert share == pytest.approx(0.1, abs=0.01)  # the standard error is 0.002


@pytest.mark.parametrize("seed", range(4))
def test_by_num_classes_says_how_many_classes_were_added_to_who_asks(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = int(rng(seed).integers(1, 4, endpoint=True))  # the first draw; the only client needs all 4 classes
    with caplog.at_level(logging.DEBUG):
        by_num_classes(labels_of([5] * 4), 1, rng(seed), min_classes=1)
    expected = [f"so clients got further classes, {4 - drawn} in all for 1 clients"] if drawn < 4 else []
    assert [message[message.index("so clients") :].partition(";")[0] for message in caplog.messages] == expected
    assert all(record.levelno == logging.DEBUG for record in caplog.records)  # it needs no action


@pytest.mark.parametrize("min_size", [0, 1, 10])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_by_dirichlet_hands_out_everything_and_keeps_the_smallest_size(alpha: float, min_size: int, seed: int) -> None:
    labels = labels_of([200, 120, 60, 20], seed)
    clients = by_dirichlet(labels, 5, rng(seed), alpha=alpha, min_size=min_size)
    assert sorted(used(clients).tolist()) == list(range(len(labels)))
    assert min(sizes(clients)) >= min_size


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
def test_by_dirichlet_shares_have_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    labels = np.zeros(2000, dtype=np.int64)
    shares = [len(by_dirichlet(labels, 2, rng(seed), alpha=alpha, min_size=0)[0]) / 2000 for seed in range(800)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)  # Beta(alpha, alpha)


def test_by_dirichlet_shares_each_class_by_itself() -> None:
    labels = labels_of([100, 100])
    histogram = class_histogram(labels, by_dirichlet(labels, 4, rng(), alpha=0.5, min_size=0), 2)
    assert histogram.sum(0).tolist() == [100, 100]
    assert not np.array_equal(histogram[:, 0], histogram[:, 1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shards_per_client", [1, 2, 3])
@pytest.mark.parametrize(("counts", "num_clients"), [([62, 37, 22, 13, 8, 5, 3, 2, 1, 1], 7), ([30, 20, 5, 1], 4)])
def test_by_shards_gives_equal_sizes_and_few_classes(
    counts: list[int], num_clients: int, shards_per_client: int, seed: int
) -> None:
    labels = labels_of(counts, seed)
    clients = by_shards(labels, num_clients, rng(seed), shards_per_client=shards_per_client)
    num_shards = num_clients * shards_per_client
    assert sizes(clients) == [len(labels) // num_shards * shards_per_client] * num_clients
    # each border between two classes lies in at most one shard
    pairs = np.count_nonzero(class_histogram(labels, clients, len(counts)))
    assert pairs <= num_shards + len(counts) - 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shards_per_client", [1, 2, 5])
def test_by_shards_holds_at_most_so_many_classes_where_shards_fit(shards_per_client: int, seed: int) -> None:
    labels = labels_of([40] * 5, seed)
    clients = by_shards(labels, 5, rng(seed), shards_per_client=shards_per_client)
    assert sorted(used(clients).tolist()) == list(range(200))
    assert np.count_nonzero(class_histogram(labels, clients, 5), axis=1).max() <= shards_per_client


@pytest.mark.parametrize("num_clients", [20, 100])
def test_by_shards_takes_the_unused_examples_from_all_classes(num_clients: int) -> None:
    labels = labels_of(LONG_TAIL)
    clients = by_shards(labels, num_clients, rng())
    kept = class_histogram(labels, clients, 10).sum(0) / LONG_TAIL
    assert len(used(clients)) / len(labels) > 0.98
    assert kept.min() > 0.8  # the rarest class would pay for all, were the leftover the end of the sorted labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("counts", "num_clients"), SHAPES)
def test_iid_hands_out_everything_evenly(counts: list[int], num_clients: int, seed: int) -> None:
    labels = labels_of(counts, seed)
    clients = iid(labels, num_clients, rng(seed))
    assert sorted(used(clients).tolist()) == list(range(len(labels)))
    assert max(sizes(clients)) - min(sizes(clients)) <= 1


def test_iid_mixes_the_classes() -> None:
    labels = np.repeat(np.arange(4), 100)
    histogram = class_histogram(labels, iid(labels, 4, rng()), 4)
    assert histogram.min() > 10  # 25 expected


def test_class_histogram_counts_each_class_at_each_client() -> None:
    clients = [np.array([0, 1, 4]), np.array([], dtype=np.int64), np.array([2])]
    assert class_histogram(np.array([0, 2, 2, 1, 0]), clients, 4).tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(
    ("num_clients", "message"),
    [
        (0, "Expected `num_clients` to be 1 or more, got 0"),
        (-3, "Expected `num_clients` to be 1 or more, got -3"),
        (13, r"Expected `num_clients` to be at most the number of training examples \(12 here\), got 13"),
    ],
)
def test_number_of_clients_out_of_range_is_refused(name: str, num_clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PARTITIONS[name](labels_of([6, 6]), num_clients, rng())


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (partial(by_num_classes, min_classes=0), r"`min_classes_per_client` to be in 1\.\.2, got 0"),
        (partial(by_num_classes, min_classes=3), r"`min_classes_per_client` to be in 1\.\.2, got 3"),
        (partial(by_dirichlet, alpha=0.0), "`dirichlet_alpha` to be a number above 0, got 0.0"),
        (partial(by_dirichlet, alpha=-1.0), "`dirichlet_alpha` to be a number above 0, got -1.0"),
        (partial(by_dirichlet, alpha=float("nan")), "`dirichlet_alpha` to be a number above 0, got nan"),
        (partial(by_dirichlet, alpha=float("inf")), "`dirichlet_alpha` to be a number above 0, got inf"),
        (partial(by_dirichlet, min_size=-1), "`min_client_size` to be 0 or more, got -1"),
        (
            partial(by_dirichlet, min_size=5),
            "`min_client_size` = 5 examples, got none such in 1000 draws with alpha 0.5",
        ),
        (partial(by_dirichlet, alpha=1e-300, min_size=1), "none such in 1000 draws .*: raise the alpha"),
        (partial(by_shards, shards_per_client=0), "`shards_per_client` to be 1 or more, got 0"),
        (partial(by_shards, shards_per_client=5), r"`num_clients` to be at most .* \(2 here\), got 3"),
    ],
)
def test_option_out_of_range_is_refused(split: Partition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(labels_of([6, 6]), 3, rng())
