"""Shot groups against the figures of the literature, and accuracies against a plain loop."""

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fedamm_pl.data.long_tail import long_tail_counts
from fedamm_pl.federation.trainer import quiet
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
    return {name: float(value) for name, value in metric.accuracies().items()}


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
    metric = ShotAccuracy(3, {"many": [0]})
    assert metric.accuracies() == {}
    assert metric.compute().isnan()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert metric.accuracies() == {}


def test_micro_accuracy_equals_torchmetrics() -> None:
    ours, theirs = ShotAccuracy(NUM_CLASSES), MulticlassAccuracy(NUM_CLASSES, average="micro")
    for seed in range(3):
        scores, target = batch(seed, classes=4)
        ours.update(scores, target)
        theirs.update(scores, target)
    assert computed(ours)["acc"] == pytest.approx(float(theirs.compute()), abs=1e-7)
    assert 0 < computed(ours)["acc"] < 1


# What is no prediction and no target

TARGET = torch.tensor([1, 2, 1])


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (
            TARGET[:, None],
            TARGET,
            r"`preds` to be classes of shape \(3,\) or scores of shape \(3, 3\) .*, got shape \(3, 1\)",
        ),
        (TARGET[:1], TARGET, r"`preds` .* as there are 3 targets, got shape \(1,\)"),
        (torch.eye(3)[:1], TARGET, r"got shape \(1, 3\)"),
        (torch.rand(3, 4), TARGET, r"got shape \(3, 4\)"),
        (torch.rand(3, 3, 2), TARGET, r"got shape \(3, 3, 2\)"),
        (torch.tensor(1), TARGET, r"got shape \(\)"),
        (
            torch.tensor([0.9, 0.2, 0.7]),
            TARGET,
            r"`preds` to be a tensor of classes, whole numbers, got torch\.float32",
        ),
        (torch.eye(3).long(), TARGET, r"`preds` of shape \(N, C\) to be floating-point scores, got torch\.int64"),
        (TARGET > 1, TARGET, r"`preds` to be a tensor of classes, whole numbers, got torch\.bool"),
        ([1, 2, 1], TARGET, "`preds` to be a tensor, got a list"),
        (torch.tensor([1, 3, 1]), TARGET, "`preds` to hold classes 0 to 2, got 1 to 3"),
        (torch.tensor([1, -1, 1]), TARGET, "`preds` to hold classes 0 to 2, got -1 to 1"),
        (TARGET, torch.tensor([1, 3, 1]), "`target` to hold classes 0 to 2, got 1 to 3"),
        (TARGET, torch.tensor([1, -1, 1]), "`target` to hold classes 0 to 2, got -1 to 1"),
        (TARGET, torch.tensor([1, -(2**63), 1]), "`target` to hold classes 0 to 2"),
        (TARGET, torch.tensor([1, 2**62, 1]), "`target` to hold classes 0 to 2"),
        (TARGET, TARGET.float(), r"`target` to be a tensor of classes, whole numbers, got torch\.float32"),
        (TARGET, TARGET[:, None], r"`target` to have shape \(N,\), got \(3, 1\)"),
        (TARGET, np.array([1, 2, 1]), "`target` to be a tensor of classes, whole numbers, got a ndarray"),
    ],
)
def test_what_is_no_prediction_or_no_target_is_refused_and_not_counted(preds: Any, target: Any, message: str) -> None:
    metric = ShotAccuracy(3)
    with pytest.raises(ValueError, match=message):
        metric.update(preds, target)
    assert not metric.counts.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_types_of_classes_do_not_overflow(dtype: torch.dtype) -> None:
    metric = ShotAccuracy(127)
    metric.update(torch.tensor([126, 3], dtype=dtype), torch.tensor([126, 125], dtype=dtype))
    assert computed(metric) == {"acc": 0.5, "acc_class_125": 0.0, "acc_class_126": 1.0}


def test_nan_counts_as_the_largest_score_as_in_torchmetrics() -> None:
    scores, target = torch.tensor([[0.0, torch.nan], [1.0, 0.0]]), torch.tensor([0, 0])
    ours, theirs = ShotAccuracy(2), MulticlassAccuracy(2, average="micro")
    for metric in (ours, theirs):
        metric.update(scores, target)
    assert ours.compute() == theirs.compute() == 0.5


@pytest.mark.parametrize(
    ("num_classes", "groups", "message"),
    [
        (0, {}, "`num_classes` to be a whole number of 1 or more, got 0"),
        (2.0, {}, r"`num_classes` to be a whole number of 1 or more, got 2\.0"),
        (True, {}, "`num_classes` to be a whole number of 1 or more, got True"),
        (3, {"few": [5]}, r"`groups` to hold each class of 0 to 2 once at most, got \[5\] for few"),
        (3, {"few": [-1]}, r"once at most, got \[-1\] for few"),
        (3, {"many": [0], "few": [1, 2, 1]}, r"once at most, got \[1, 2, 1\] for few"),
        (3, {"few": [1.0]}, r"`groups` to hold classes, whole numbers, got \[1\.0\] for few"),
        (3, {"few": [True]}, r"`groups` to hold classes, whole numbers, got \[True\] for few"),
        (3, {"few": "12"}, "`groups` to hold classes, whole numbers, got "),
        (3, {"class_1": [0]}, "names of `groups` to be texts that do not begin with class_, got 'class_1'"),
        (3, {7: [0]}, "names of `groups` to be texts .*, got 7"),
    ],
)
def test_groups_that_are_none_are_refused_when_the_metric_is_made(num_classes: Any, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShotAccuracy(num_classes, groups)


def test_whole_numbers_of_numpy_are_classes() -> None:
    assert ShotAccuracy(np.int64(3), {"few": np.array([1, 2])}).groups == {"few": [1, 2]}  # type: ignore[dict-item]


# As a metric of torchmetrics and Lightning


def test_it_is_a_scalar_to_torchmetrics() -> None:
    scores, target = batch(0)
    metric = ShotAccuracy(NUM_CLASSES, GROUPS)
    half = metric(scores[:30], target[:30])  # of the batch alone
    assert half == (scores[:30].argmax(1) == target[:30]).float().mean()
    metric(scores[30:], target[30:])
    assert metric.compute().shape == ()
    assert metric.compute() == metric.accuracies()["acc"] == (scores.argmax(1) == target).float().mean()
    collection = MetricCollection({"shots": ShotAccuracy(NUM_CLASSES, GROUPS), "acc": MulticlassAccuracy(NUM_CLASSES)})
    test = collection.clone(prefix="test/")
    test.update(scores, target)
    assert test.compute()["test/shots"] == metric.compute()
    assert computed(test["shots"]) == computed(metric)  # type: ignore[arg-type]
    test.reset()
    assert test["shots"].accuracies() == {}  # type: ignore[operator]


@pytest.mark.parametrize("synced", [True, False])
def test_accuracies_are_those_of_all_processes_as_the_scalar_is(synced: bool) -> None:
    def two_processes(value: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [value, other.counts]

    other, whole = ShotAccuracy(NUM_CLASSES, GROUPS), ShotAccuracy(NUM_CLASSES, GROUPS)
    metric = ShotAccuracy(
        NUM_CLASSES,
        GROUPS,
        dist_sync_fn=two_processes,
        distributed_available_fn=lambda: True,
        sync_on_compute=synced,
    )
    metric.update(*batch(0))
    other.update(*batch(1))
    for seed in (0, 1) if synced else (0,):
        whole.update(*batch(seed))
    for _ in range(2):  # the second time as well: it goes back to its own examples
        assert computed(metric) == computed(whole)
        assert metric.compute() == whole.compute()


class Logs(pl.LightningModule):
    """Logs the metric in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = ShotAccuracy(NUM_CLASSES, GROUPS)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy.update(*batch)
        self.log("test/acc", self.accuracy)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"all/{name}": value for name, value in self.accuracy.accuracies().items()})


def test_lightning_logs_it_and_resets_it() -> None:
    module = Logs()
    loader = DataLoader(TensorDataset(*batch(0)), batch_size=7)
    expected = ShotAccuracy(NUM_CLASSES, GROUPS)
    expected.update(*batch(0))
    for _ in range(2):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        with quiet():
            (logged,) = trainer.test(module, loader, verbose=False)
        assert logged.pop("test/acc") == pytest.approx(float(expected.compute()))
        assert logged == {f"all/{name}": value for name, value in computed(expected).items()}
