"""Partitions and the long-tailed split: what they promise, for any labels, options and seeds."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedamm_pl.data.long_tail import LongTailSplit, long_tail_counts, long_tail_split
from fedamm_pl.data.partitions import dirichlet as dirichlet_partitions
from fedamm_pl.data.partitions import local_long_tail
from fedamm_pl.data.partitions import simulated as partitions
from fedamm_pl.data.partitions.dirichlet import by_dirichlet_balanced, by_dirichlet_blocks
from fedamm_pl.data.partitions.local_long_tail import by_local_long_tail
from fedamm_pl.data.partitions.simulated import (
    MAX_REDRAWS,
    by_dirichlet,
    by_num_classes,
    by_shards,
    class_histogram,
    iid,
)

# A failure has to come back in the next run, and nothing may depend on what is on the disk.
REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=100)
# A thousand redraws take a tenth of a second.
FEW = settings(REPEATABLE, max_examples=40)

PARTITIONS: dict[str, Callable[..., list[np.ndarray]]] = {
    "by_num_classes": by_num_classes,
    "by_dirichlet": by_dirichlet,
    "by_dirichlet_blocks": by_dirichlet_blocks,
    "by_dirichlet_balanced": by_dirichlet_balanced,
    "by_local_long_tail": by_local_long_tail,
    "by_shards": by_shards,
    "iid": iid,
}
TYPES = [np.int64, np.int32, np.uint8]
SEEDS = st.integers(0, 2**32)

# Anything that a user may write for an option, possible or not.
ANY_INTEGER = st.integers(-3, 130) | st.sampled_from([-(2**63), 2**31, 2**63, 10**30])
ANY_FLOAT = st.floats() | st.floats(1e-3, 10)
ANY_OPTIONS = {
    "by_num_classes": st.fixed_dictionaries({"min_classes": ANY_INTEGER}),
    "by_dirichlet": st.fixed_dictionaries({"alpha": ANY_FLOAT, "min_size": ANY_INTEGER}),
    "by_dirichlet_blocks": st.fixed_dictionaries({"alpha": ANY_FLOAT}),
    "by_dirichlet_balanced": st.fixed_dictionaries({"alpha": ANY_FLOAT}),
    "by_local_long_tail": st.fixed_dictionaries({"local_imbalance_factor": ANY_FLOAT, "min_size": ANY_INTEGER}),
    "by_shards": st.fixed_dictionaries({"shards_per_client": ANY_INTEGER}),
    "iid": st.just({}),
}


def made_or_refused(make: Callable[[], Any]) -> tuple[Any, str]:
    """The result and an empty text, or None and the message of a ValueError; any other exception is a failure."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def label_arrays(draw: st.DrawFn, min_size: int = 1) -> np.ndarray:
    """Labels in any order; some of the classes below the largest may be absent."""
    num_classes = draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, num_classes - 1), min_size=min_size, max_size=80))
    return np.array(values, dtype=draw(st.sampled_from(TYPES)))


@st.composite
def possible(draw: st.DrawFn, name: str) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Labels, a number of clients and options that a partition has to fulfil."""
    labels = draw(label_arrays())
    num_clients = draw(st.integers(1, len(labels)))
    options: dict[str, Any] = {}
    match name:
        case "by_num_classes":
            options["min_classes"] = draw(st.integers(1, len(np.unique(labels))))
        case "by_dirichlet":
            options = {"alpha": draw(st.floats(0.05, 100)), "min_size": 0}
        case "by_dirichlet_blocks":
            options["alpha"] = draw(st.floats(0.5, 100))
        case "by_dirichlet_balanced":
            options["alpha"] = draw(st.floats(1e-300, 1e300))
        case "by_local_long_tail":
            options = {"local_imbalance_factor": draw(st.floats(5e-324, 1)), "min_size": 0}
        case "by_shards":
            options["shards_per_client"] = draw(st.integers(1, len(labels) // num_clients))
    return labels, num_clients, options


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_clients_are_disjoint_sorted_in_range_and_repeatable(name: str, data: st.DataObject, seed: int) -> None:
    labels, num_clients, options = data.draw(possible(name))
    before = labels.copy()
    clients = PARTITIONS[name](labels, num_clients, rng(seed), **options)
    assert len(clients) == num_clients
    assert all(mine.dtype == np.int64 and mine.ndim == 1 and (np.diff(mine) > 0).all() for mine in clients)
    everyone = np.concatenate(clients)
    assert len(np.unique(everyone)) == len(everyone)
    assert everyone.min() >= 0
    assert everyone.max() < len(labels)
    assert np.array_equal(labels, before)
    again = PARTITIONS[name](labels.copy(), num_clients, rng(seed), **options)
    assert all(np.array_equal(mine, same) for mine, same in zip(clients, again, strict=True))


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_sizes_are_those_documented(name: str, data: st.DataObject, seed: int) -> None:
    labels, num_clients, options = data.draw(possible(name))
    sizes = [len(mine) for mine in PARTITIONS[name](labels, num_clients, rng(seed), **options)]
    match name:
        case "by_num_classes" | "by_dirichlet_balanced":
            assert sizes == [len(labels) // num_clients] * num_clients
        case "by_dirichlet" | "by_local_long_tail":
            assert sum(sizes) == len(labels)
        case "by_dirichlet_blocks":
            assert sum(sizes) == len(labels)
            for start in range(0, num_clients, 10):
                block = sizes[start : start + 10]
                if len(block) == 10:
                    assert start + 10 == num_clients or sum(block) == 10 * len(labels) // num_clients
                assert min(block) >= sum(block) // (2 * len(block))
        case "by_shards":
            shards = options["shards_per_client"]
            assert sizes == [len(labels) // (num_clients * shards) * shards] * num_clients
        case "iid":
            assert sum(sizes) == len(labels)
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_only_the_order_of_the_classes_counts_not_their_numbers(name: str, data: st.DataObject, seed: int) -> None:
    labels, num_clients, options = data.draw(possible(name))
    clients = PARTITIONS[name](labels, num_clients, rng(seed), **options)
    renamed = PARTITIONS[name](17 * labels.astype(np.int64) + 5, num_clients, rng(seed), **options)
    assert all(np.array_equal(mine, same) for mine, same in zip(clients, renamed, strict=True))


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_histogram_counts_what_each_client_holds(name: str, data: st.DataObject, seed: int) -> None:
    labels, num_clients, options = data.draw(possible(name))
    clients = PARTITIONS[name](labels, num_clients, rng(seed), **options)
    histogram = class_histogram(labels, clients, 9)
    assert histogram.shape == (num_clients, 9)
    for mine, counts in zip(clients, histogram, strict=True):
        assert counts.tolist() == [labels[mine].tolist().count(label) for label in range(9)]


@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_shards_cut_few_classes(data: st.DataObject, seed: int) -> None:
    labels, num_clients, options = data.draw(possible("by_shards"))
    clients = by_shards(labels, num_clients, rng(seed), **options)
    num_shards, num_classes = num_clients * options["shards_per_client"], len(np.unique(labels))
    assert len(labels) - sum(map(len, clients)) < num_shards
    # each border between two classes lies in at most one shard
    assert np.count_nonzero(class_histogram(labels, clients, 9)) <= num_shards + num_classes - 1


@given(labels=label_arrays(), num_clients=st.integers(1, 6), min_size=st.integers(0, 12), seed=SEEDS)
@FEW
def test_dirichlet_keeps_the_smallest_size_or_says_that_it_cannot(
    labels: np.ndarray, num_clients: int, min_size: int, seed: int
) -> None:
    clients, refusal = made_or_refused(lambda: by_dirichlet(labels, num_clients, rng(seed), min_size=min_size))
    if clients is None:
        assert num_clients > len(labels) or "`min_client_size`" in refusal
        return
    assert sorted(np.concatenate(clients).tolist()) == list(range(len(labels)))
    assert min(map(len, clients)) >= min_size


@given(
    num_clients=st.integers(1, 6),
    per_client=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    seed=SEEDS,
)
@REPEATABLE
def test_dirichlet_of_a_large_alpha_shares_every_class_equally(
    num_clients: int, per_client: list[int], seed: int
) -> None:
    labels = rng(seed).permutation(np.repeat(np.arange(len(per_client)), num_clients * np.array(per_client)))
    clients = by_dirichlet(labels, num_clients, rng(seed), alpha=1e12, min_size=sum(per_client))
    assert class_histogram(labels, clients, len(per_client)).tolist() == [per_client] * num_clients


class Counting(np.random.Generator):
    """Counts the draws of proportions."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.draws = 0

    def dirichlet(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.draws += 1
        return super().dirichlet(*args, **kwargs)


@given(labels=label_arrays(), num_clients=st.integers(1, 6), alpha=st.floats(1e-310, 1e308), seed=SEEDS)
@example(labels=np.zeros(9, dtype=np.int64), num_clients=3, alpha=1e-300, seed=0)  # everything to one client
@FEW
def test_dirichlet_gives_up_after_so_many_draws(labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> None:
    counting, impossible = Counting(seed), len(labels) // num_clients + 1
    with pytest.raises(ValueError, match=r"`num_clients` to be at most|`min_client_size` ="):
        by_dirichlet(labels, num_clients, counting, alpha=alpha, min_size=impossible)
    assert counting.draws == (MAX_REDRAWS if num_clients <= len(labels) else 0)


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data(), seed=SEEDS)
@REPEATABLE
def test_options_of_any_kind_are_fulfilled_or_refused(name: str, data: st.DataObject, seed: int) -> None:
    labels, num_clients = data.draw(label_arrays(min_size=0)), data.draw(ANY_INTEGER)
    options = data.draw(ANY_OPTIONS[name])
    with pytest.MonkeyPatch.context() as patch:
        # how many there are is another test's subject
        patch.setattr(partitions, "MAX_REDRAWS", 20)
        patch.setattr(local_long_tail, "MAX_REDRAWS", 20)
        patch.setattr(dirichlet_partitions, "MAX_BLOCK_REDRAWS", 20)
        clients, refusal = made_or_refused(lambda: PARTITIONS[name](labels, num_clients, rng(seed), **options))
    if clients is None:
        assert refusal.startswith("Expected `")
        return
    assert len(clients) == num_clients
    assert set(np.concatenate(clients).tolist()) <= set(range(len(labels)))
    # a block of fewer than two examples a client may leave one without any
    assert min(map(len, clients)) >= options.get("min_size", 0 if name == "by_dirichlet_blocks" else 1)


# The long-tailed split

PROFILES = st.sampled_from(["exponential", "step", "none"])
FACTORS = st.floats(0.01, 1) | st.sampled_from([0.01, 0.02, 0.1, 0.29, 0.3, 0.5, 1.0])


@st.composite
def training_sets(draw: st.DrawFn, balanced: bool = False) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Labels with at least m + 1 examples of each class, the number of classes, and options."""
    num_classes, num_meta = draw(st.integers(1, 7)), draw(st.integers(0, 4))
    per_class = st.integers(num_meta + 1, 60)
    counts = [draw(per_class)] * num_classes if balanced else [draw(per_class) for _ in range(num_classes)]
    labels = rng(draw(SEEDS)).permutation(np.repeat(np.arange(num_classes), counts))
    options = {
        "num_meta_per_class": num_meta,
        "imbalance_factor": draw(FACTORS),
        "profile": draw(PROFILES),
        **draw(st.sampled_from([{}, {"shuffle_ranks": True}, {"ranks_by_size": True}])),
    }
    return labels.astype(draw(st.sampled_from(TYPES))), num_classes, options


def split_or_none(labels: np.ndarray, num_classes: int, seed: int, options: dict[str, Any]) -> LongTailSplit | None:
    """The split; None where the factor leaves a class without any image, the one thing these options may ask too much."""
    split, refusal = made_or_refused(lambda: long_tail_split(labels, num_classes, rng(seed), **options))
    if split is None:
        assert "`imbalance_factor` to leave every class at least 1 training example" in refusal
        assert refusal.endswith("; `imbalance_profile` none cuts no tail.")
        largest = (len(labels) - options["num_meta_per_class"] * num_classes) / num_classes
        assert options["profile"] != "none"
        assert largest * options["imbalance_factor"] < 1 + 1e-9
    return cast("LongTailSplit | None", split)


@given(case=training_sets(), seed=SEEDS)
@REPEATABLE
def test_meta_set_is_balanced_grouped_by_class_and_apart_from_the_training_set(
    case: tuple[np.ndarray, int, dict[str, Any]], seed: int
) -> None:
    labels, num_classes, options = case
    if (split := split_or_none(*case[:2], seed, options)) is None:
        return
    assert labels[split.meta].tolist() == np.repeat(np.arange(num_classes), options["num_meta_per_class"]).tolist()
    assert len(np.unique(split.meta)) == len(split.meta)
    assert (np.diff(split.train) > 0).all()
    assert not set(split.meta.tolist()) & set(split.train.tolist())
    assert set(split.train.tolist()) <= set(range(len(labels)))
    assert np.bincount(labels[split.train], minlength=num_classes).tolist() == split.class_counts
    assert min(split.class_counts) >= 1
    again = split_or_none(labels.copy(), num_classes, seed, options)
    assert again is not None
    assert np.array_equal(again.train, split.train)
    assert np.array_equal(again.meta, split.meta)


@given(case=training_sets(), seed=SEEDS)
@REPEATABLE
def test_every_class_keeps_what_its_rank_allows_and_it_has(
    case: tuple[np.ndarray, int, dict[str, Any]], seed: int
) -> None:
    labels, num_classes, options = case
    if (split := split_or_none(*case[:2], seed, options)) is None:
        return
    left = np.bincount(labels, minlength=num_classes) - options["num_meta_per_class"]
    largest = left.sum() / num_classes
    allowed = long_tail_counts(num_classes, largest, options["imbalance_factor"], options["profile"])
    # the first draw of the split's generator
    ranks = rng(seed).permutation(num_classes) if options.get("shuffle_ranks") else np.arange(num_classes)
    if options.get("ranks_by_size"):
        ranks = np.array(
            [sum((size, -label) > (left[k], -k) for label, size in enumerate(left)) for k in range(num_classes)]
        )
    expected = [min(int(left[label]), allowed[ranks[label]]) for label in range(num_classes)]
    assert split.class_counts == expected


@given(labels=label_arrays(), seed=SEEDS)
@REPEATABLE
def test_meta_set_may_leave_one_example_of_a_class_but_not_none(labels: np.ndarray, seed: int) -> None:
    labels = np.unique(labels, return_inverse=True)[1]
    num_classes, least = int(labels.max()) + 1, int(np.bincount(labels).min())
    split = long_tail_split(labels, num_classes, rng(seed), num_meta_per_class=least - 1, profile="none")
    assert min(split.class_counts) == 1
    assert sum(split.class_counts) + len(split.meta) == len(labels)
    with pytest.raises(ValueError, match="`num_meta_per_class`"):
        long_tail_split(labels, num_classes, rng(seed), num_meta_per_class=least, profile="none")


@given(case=training_sets(balanced=True), seed=SEEDS)
@REPEATABLE
def test_balanced_classes_get_the_profile_itself_by_rank(
    case: tuple[np.ndarray, int, dict[str, Any]], seed: int
) -> None:
    labels, num_classes, options = case
    if (split := split_or_none(*case[:2], seed, options)) is None:
        return
    per_class = len(labels) // num_classes - options["num_meta_per_class"]
    allowed = long_tail_counts(num_classes, per_class, options["imbalance_factor"], options["profile"])
    counts = sorted(split.class_counts, reverse=True) if options.get("shuffle_ranks") else split.class_counts
    assert counts == [min(per_class, count) for count in allowed]
    assert counts == sorted(counts, reverse=True)


@given(num_classes=st.integers(1, 12), largest=st.integers(1, 10**6), factor=st.floats(1e-6, 1), profile=PROFILES)
@example(num_classes=10, largest=4990, factor=0.01, profile="exponential")
@example(num_classes=2, largest=100, factor=0.29, profile="exponential")
@example(num_classes=2, largest=10, factor=0.3, profile="exponential")
@example(num_classes=1, largest=1, factor=1.0, profile="exponential")
@REPEATABLE
def test_profile_equals_exact_arithmetic(num_classes: int, largest: int, factor: float, profile: Any) -> None:
    counts = long_tail_counts(num_classes, largest, factor, profile)
    assert len(counts) == num_classes
    assert counts == sorted(counts, reverse=True)
    if profile == "none":
        assert min(counts) == 2**63 - 1
        return
    # count = floor(largest * factor ** (p / q)), that is count ** q <= largest ** q * factor ** p < (count + 1) ** q;
    # the slack is for products that are whole numbers but for rounding
    slack, exact = Fraction(1, 10**12), Fraction(factor)
    for rank, count in enumerate(counts):
        if profile == "exponential":
            p, q = rank, max(num_classes - 1, 1)
        else:
            p, q = (0, 1) if rank < num_classes // 2 else (1, 1)
        power = Fraction(largest) ** q * exact**p
        assert count**q <= power * (1 + slack) ** q
        assert power * (1 - slack) ** q < (count + 1) ** q


@given(
    labels=label_arrays(),
    seed=SEEDS,
    num_meta=ANY_INTEGER,
    factor=st.floats() | FACTORS,
    profile=st.sampled_from(["exponential", "step", "none", "linear"]),
)
@REPEATABLE
def test_split_of_any_options_is_made_or_refused(
    labels: np.ndarray, seed: int, num_meta: int, factor: float, profile: Any
) -> None:
    num_classes = int(labels.max()) + 1
    options: dict[str, Any] = {"num_meta_per_class": num_meta, "imbalance_factor": factor, "profile": profile}
    split, refusal = made_or_refused(lambda: long_tail_split(labels, num_classes, rng(seed), **options))
    if split is None:
        assert refusal.startswith("Expected ")
        return
    assert len(split.meta) == num_classes * num_meta
    assert min(split.class_counts) >= 1
