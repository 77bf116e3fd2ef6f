"""Shot groups and accuracies for any class counts and any predictions, against exact fractions and a slow loop."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedamm_pl.metrics import GROUPS, ShotAccuracy, shot_groups

# A failure has to come back in the next run, and nothing may depend on what is on the disk.
REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=100)

COUNTS = st.lists(
    st.integers(0, 10_000) | st.sampled_from([0, 1, 19, 20, 21, 99, 100, 101]) | st.integers(0, 10**15),
    min_size=1,
    max_size=25,
).filter(any)
RARITY = {name: rarity for rarity, name in enumerate(GROUPS)}


def group_of(groups: dict[str, list[int]], num_classes: int) -> list[str]:
    """Group by class; requires sorted groups that hold every class once."""
    assert all(members == sorted(members) for members in groups.values())
    names = {label: name for name, members in groups.items() for label in members}
    assert sum(map(len, groups.values())) == len(names)
    assert sorted(names) == list(range(num_classes))
    return [names[label] for label in range(num_classes)]


@given(counts=COUNTS)
@REPEATABLE
def test_counts_rule_follows_its_thresholds(counts: list[int]) -> None:
    groups = shot_groups(counts, "counts")
    assert tuple(groups) == GROUPS
    for count, name in zip(counts, group_of(groups, len(counts)), strict=True):
        assert (name == "many") == (count > 100)
        assert (name == "few") == (count < 20)


def share_up_to(counts: list[int], label: int) -> Fraction:
    """The share of images in the class, in more frequent ones, and in equally frequent ones of smaller index."""
    before = [
        count
        for other, count in enumerate(counts)
        if count > counts[label] or (count == counts[label] and other <= label)
    ]
    return Fraction(sum(before), sum(counts))


@given(counts=COUNTS)
@example(counts=[75, 20, 5])
@example(counts=[3 * 10**17 + 1, 10**17 - 1])  # a share that is above the threshold, but not in floating point
@example(counts=[19 * 10**17 + 1, 10**17 - 1])
@example(counts=[1] * 20)
@REPEATABLE
def test_share_rule_follows_exact_cumulative_shares(counts: list[int]) -> None:
    groups = shot_groups(counts, "share")
    assert tuple(groups) == GROUPS
    for label, name in enumerate(group_of(groups, len(counts))):
        share = share_up_to(counts, label)
        assert name == ("many" if share <= Fraction(3, 4) else "medium" if share <= Fraction(19, 20) else "few")


@pytest.mark.parametrize("rule", ["counts", "share"])
@given(counts=COUNTS)
@REPEATABLE
def test_a_more_frequent_class_is_never_in_a_rarer_group(rule: Any, counts: list[int]) -> None:
    names = group_of(shot_groups(counts, rule), len(counts))
    by_count = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    rarities = [RARITY[names[label]] for label in by_count]
    assert rarities == sorted(rarities)


@given(counts=COUNTS, factor=st.integers(1, 10**6))
@REPEATABLE
def test_share_rule_depends_on_shares_alone(counts: list[int], factor: int) -> None:
    assert shot_groups([factor * count for count in counts], "share") == shot_groups(counts, "share")


@given(counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=25, unique=True).filter(any), data=st.data())
@REPEATABLE
def test_share_rule_moves_with_the_classes(counts: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(counts))))
    names = group_of(shot_groups(counts, "share"), len(counts))
    moved = group_of(shot_groups([counts[label] for label in order], "share"), len(counts))
    assert moved == [names[label] for label in order]


@given(data=st.data(), num_classes=st.integers(1, 25))
@REPEATABLE
def test_index_rule_holds_the_ranges_given(data: st.DataObject, num_classes: int) -> None:
    borders = sorted(data.draw(st.sets(st.integers(0, num_classes), min_size=2)) | {0, num_classes})
    ranges = {f"group {first}": [first, last - 1] for first, last in itertools.pairwise(borders)}
    groups = shot_groups([1] * num_classes, "index", ranges)
    assert list(groups) == list(ranges)
    group_of(groups, num_classes)
    assert all((members[0], members[-1]) == tuple(ranges[name]) for name, members in groups.items())


def groups_or_refusal(num_classes: int, ranges: dict[str, list[int]] | None) -> tuple[dict[str, list[int]] | None, str]:
    try:
        return shot_groups([1] * num_classes, "index", ranges), ""
    except ValueError as error:
        return None, str(error)


ENDS = st.integers(-3, 12) | st.sampled_from([-(2**63), 2**31, 2**63, 10**15])


@given(
    num_classes=st.integers(1, 10),
    ranges=st.dictionaries(st.text(max_size=3), st.lists(ENDS, min_size=0, max_size=3), max_size=4) | st.none(),
)
# a class number with some zeros too many: the range must not be written out in memory
@example(num_classes=10, ranges={"many": [0, 10**15]})
@REPEATABLE
def test_ranges_of_any_kind_are_fulfilled_or_refused(num_classes: int, ranges: dict[str, list[int]] | None) -> None:
    groups, refusal = groups_or_refusal(num_classes, ranges)
    assert "`shot_ranges`" in refusal or groups is not None
    members = [label for group in (groups or {}).values() for label in group]
    assert len(set(members)) == len(members)
    assert set(members) <= set(range(num_classes))


# Accuracies


@st.composite
def predictions(draw: st.DrawFn) -> tuple[int, dict[str, list[int]], list[int], list[int]]:
    """A number of classes, groups of some of them, predicted and true classes."""
    num_classes = draw(st.integers(1, 6))
    label = st.integers(0, num_classes - 1)
    pairs = draw(st.lists(st.tuples(label, label), min_size=1, max_size=40))
    groups = draw(st.dictionaries(st.sampled_from(GROUPS), st.lists(label, unique=True)))
    predicted, target = zip(*pairs, strict=True)
    return num_classes, groups, list(predicted), list(target)


def slow_accuracies(groups: dict[str, list[int]], predicted: list[int], target: list[int]) -> dict[str, Fraction]:
    """The same by exact fractions, one example at a time."""
    seen: dict[int, int] = {}
    right: dict[int, int] = {}
    for guess, label in zip(predicted, target, strict=True):
        seen[label] = seen.get(label, 0) + 1
        right[label] = right.get(label, 0) + (guess == label)
    per_class = {label: Fraction(right[label], seen[label]) for label in sorted(seen)}
    result = {"acc": Fraction(sum(right.values()), len(target))}
    for name, members in groups.items():
        accuracies = [per_class[label] for label in members if label in per_class]
        if accuracies:
            result[f"acc_{name}"] = sum(accuracies, Fraction(0)) / len(accuracies)
    return result | {f"acc_class_{label}": accuracy for label, accuracy in per_class.items()}


def measured(num_classes: int, groups: dict[str, list[int]], batches: list[tuple[Any, Any]]) -> ShotAccuracy:
    metric = ShotAccuracy(num_classes, groups)
    for predicted, target in batches:
        metric.update(torch.as_tensor(predicted), torch.as_tensor(target))
    return metric


def computed(metric: ShotAccuracy) -> dict[str, float]:
    return {name: float(value) for name, value in metric.accuracies().items()}


@given(case=predictions())
@REPEATABLE
def test_accuracies_equal_a_slow_loop(case: tuple[int, dict[str, list[int]], list[int], list[int]]) -> None:
    num_classes, groups, predicted, target = case
    result = computed(measured(num_classes, groups, [(predicted, target)]))
    expected = slow_accuracies(groups, predicted, target)
    assert list(result) == list(expected)
    assert result == {name: pytest.approx(float(value), abs=2e-7) for name, value in expected.items()}
    assert all(0 <= value <= 1 for value in result.values())


@given(case=predictions(), data=st.data())
@REPEATABLE
def test_any_split_into_batches_gives_the_same_bits(
    case: tuple[int, dict[str, list[int]], list[int], list[int]], data: st.DataObject
) -> None:
    num_classes, groups, predicted, target = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(target)), max_size=5)))
    order = data.draw(st.permutations(range(len(target))))
    batches = [
        (torch.tensor(predicted)[part], torch.tensor(target)[part])
        for part in np.split(np.array(order), cuts)  # cuts that coincide leave empty batches
    ]
    assert computed(measured(num_classes, groups, batches)) == computed(
        measured(num_classes, groups, [(predicted, target)])
    )


@given(case=predictions(), data=st.data())
@REPEATABLE
def test_metrics_of_parts_merge_into_that_of_the_whole(
    case: tuple[int, dict[str, list[int]], list[int], list[int]], data: st.DataObject
) -> None:
    num_classes, groups, predicted, target = case
    cut = data.draw(st.integers(0, len(target)))
    first = measured(num_classes, groups, [(predicted[:cut], target[:cut])] if cut else [])
    # an empty list would become a tensor of floats
    second = measured(num_classes, groups, [(predicted[cut:], target[cut:])] if cut < len(target) else [])
    first.merge_state(second)
    assert torch.equal(first.counts, measured(num_classes, groups, [(predicted, target)]).counts)


@given(case=predictions(), seed=st.integers(0, 2**32))
@REPEATABLE
def test_scores_count_as_their_largest_entry(
    case: tuple[int, dict[str, list[int]], list[int], list[int]], seed: int
) -> None:
    num_classes, groups, predicted, target = case
    scores = np.random.default_rng(seed).random((len(target), num_classes), dtype=np.float32)
    scores[np.arange(len(target)), predicted] += 1
    assert computed(measured(num_classes, groups, [(scores, target)])) == computed(
        measured(num_classes, groups, [(predicted, target)])
    )
