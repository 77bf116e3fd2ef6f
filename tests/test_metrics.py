"""Shot groups against the figures of the literature, and accuracies against a plain loop."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from fedamm_pl.data.long_tail import long_tail_counts
from fedamm_pl.metrics import ShotAccuracy, shot_groups

GROUPS = {"many": [0, 1], "medium": [2, 4], "few": [3, 5, 6]}
NUM_CLASSES = 7


def sizes(counts: list[int], rule: str) -> tuple[int, ...]:
    groups = shot_groups(counts, rule)  # type: ignore[arg-type]
    assert sorted(label for group in groups.values() for label in group) == list(range(len(counts)))
    return tuple(len(groups[name]) for name in ("many", "medium", "few"))


def batch(seed: int, size: int = 60, classes: int = NUM_CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and targets; about two thirds of the scores are right."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (size,), generator=generator)
    scores = torch.randn(size, NUM_CLASSES, generator=generator)
    scores[torch.arange(size), target] += 2
    return scores, target


def plain_accuracies(predicted: np.ndarray, target: np.ndarray, groups: dict[str, list[int]]) -> dict[str, float]:
    result = {"acc": float(np.mean(predicted == target))}
    per_class = {int(label): float(np.mean(predicted[target == label] == label)) for label in np.unique(target)}
    for name, members in groups.items():
        seen = [per_class[label] for label in members if label in per_class]
        if seen:
            result[f"acc_{name}"] = sum(seen) / len(seen)
    return {**result, **{f"acc_class_{label}": value for label, value in per_class.items()}}


def computed(metric: ShotAccuracy) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize(("factor", "expected"), [(0.01, (34, 35, 31)), (0.02, (40, 41, 19)), (0.1, (68, 32, 0))])
def test_counts_rule_gives_the_published_groups_of_cifar100(factor: float, expected: tuple[int, ...]) -> None:
    assert sizes(long_tail_counts(100, 490, factor, "exponential"), "counts") == expected


@pytest.mark.parametrize(("factor", "expected"), [(0.01, (2, 3, 5)), (0.02, (3, 3, 4)), (0.1, (4, 4, 2))])
def test_share_rule_gives_the_published_groups_of_cifar10(factor: float, expected: tuple[int, ...]) -> None:
    assert sizes(long_tail_counts(10, 4990, factor, "exponential"), "share") == expected


def test_counts_rule_at_its_borders() -> None:
    assert shot_groups([19, 101, 100, 20], "counts") == {"many": [1], "medium": [2, 3], "few": [0]}


def test_share_rule_at_its_borders() -> None:
    assert shot_groups([75, 20, 5], "share") == {"many": [0], "medium": [1], "few": [2]}
    assert shot_groups([74, 21, 5], "share") == {"many": [0], "medium": [1], "few": [2]}
    assert shot_groups([76, 18, 6], "share") == {"many": [], "medium": [0, 1], "few": [2]}


def test_share_rule_goes_by_falling_count_and_then_by_index() -> None:
    assert shot_groups([5, 20, 75], "share") == {"many": [2], "medium": [1], "few": [0]}
    assert shot_groups([25, 25, 25, 25], "share") == {"many": [0, 1, 2], "medium": [], "few": [3]}


def test_index_rule_takes_ranges_with_both_ends() -> None:
    ranges = {"many": [0, 2], "few": (4, 4)}
    assert shot_groups([1] * 5, "index", ranges) == {"many": [0, 1, 2], "few": [4]}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (None, "`shot_ranges` to give first and last class of each group .* got None"),
        ({}, "`shot_ranges` to give first and last class of each group"),
        ({"many": [0, 1, 2]}, "`shot_ranges` to give first and last class of each group"),
        ({"many": [0, 2], "few": [2, 4]}, r"`shot_ranges` to be disjoint within 0\.\.4"),
        ({"many": [3, 5]}, r"`shot_ranges` to be disjoint within 0\.\.4"),
        ({"many": [-1, 1]}, r"`shot_ranges` to be disjoint within 0\.\.4"),
        ({"many": [0, 1], "few": [4, 2]}, "`shot_ranges`"),
    ],
)
def test_wrong_ranges_are_refused(ranges: dict[str, list[int]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shot_groups([1] * 5, "index", ranges)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `shot_rule` to be counts, share or index, got 'quantile'"):
        shot_groups([1, 2], "quantile")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 5, 60])  # few examples leave classes and groups out
def test_accuracies_equal_a_plain_loop(size: int, seed: int) -> None:
    scores, target = batch(seed, size)
    metric = ShotAccuracy(NUM_CLASSES, GROUPS)
    metric.update(scores, target)
    assert computed(metric) == pytest.approx(plain_accuracies(scores.argmax(1).numpy(), target.numpy(), GROUPS))


def test_predicted_classes_count_as_scores_do() -> None:
    scores, target = batch(0)
    by_scores, by_classes = ShotAccuracy(NUM_CLASSES, GROUPS), ShotAccuracy(NUM_CLASSES, GROUPS)
    by_scores.update(scores, target)
    by_classes.update(scores.argmax(1), target)
    assert computed(by_scores) == computed(by_classes)


def test_absent_class_is_left_out_and_never_a_zero() -> None:
    metric = ShotAccuracy(4, {"many": [0, 1], "few": [2, 3]})
    metric.update(torch.tensor([0, 3, 2, 1]), torch.tensor([0, 0, 2, 2]))  # classes 1 and 3 only ever predicted
    assert computed(metric) == {"acc": 0.5, "acc_many": 0.5, "acc_few": 0.5, "acc_class_0": 0.5, "acc_class_2": 0.5}


def test_group_without_examples_or_classes_is_absent() -> None:
    metric = ShotAccuracy(3, {"many": [0], "medium": [], "few": [1, 2]})
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert computed(metric) == {"acc": 0.5, "acc_many": 0.5, "acc_class_0": 0.5}


def test_groups_are_optional() -> None:
    metric = ShotAccuracy(2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert computed(metric) == {"acc": 1.0, "acc_class_0": 1.0, "acc_class_1": 1.0}


def test_updates_add_up() -> None:
    batches = [batch(seed, size) for seed, size in ((0, 60), (1, 1), (2, 17))]
    metric = ShotAccuracy(NUM_CLASSES, GROUPS)
    for scores, target in batches:
        metric.update(scores, target)
    scores, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert computed(metric) == pytest.approx(plain_accuracies(scores.argmax(1).numpy(), target.numpy(), GROUPS))


def test_two_metrics_merge_into_one() -> None:
    parts, whole = [ShotAccuracy(NUM_CLASSES, GROUPS) for _ in range(2)], ShotAccuracy(NUM_CLASSES, GROUPS)
    for seed, part in enumerate(parts):
        part.update(*batch(seed))
        whole.update(*batch(seed))
    parts[0].merge_state(parts[1])
    assert computed(parts[0]) == computed(whole)


def test_reset_forgets() -> None:
    metric = ShotAccuracy(NUM_CLASSES, GROUPS)
    metric.update(*batch(0))
    metric.reset()
    metric.update(*batch(1))
    fresh = ShotAccuracy(NUM_CLASSES, GROUPS)
    fresh.update(*batch(1))
    assert computed(metric) == computed(fresh)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric ShotAccuracy was called before:UserWarning")
def test_without_any_example_there_is_nothing_to_report() -> None:
    assert ShotAccuracy(3, {"many": [0]}).compute() == {}


def test_micro_accuracy_equals_torchmetrics() -> None:
    ours, theirs = ShotAccuracy(NUM_CLASSES), MulticlassAccuracy(NUM_CLASSES, average="micro")
    for seed in range(3):
        scores, target = batch(seed, classes=4)
        ours.update(scores, target)
        theirs.update(scores, target)
    assert computed(ours)["acc"] == pytest.approx(float(theirs.compute()), abs=1e-7)
    assert 0 < computed(ours)["acc"] < 1
