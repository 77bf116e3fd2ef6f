"""Accuracy per class and for many-, medium- and few-shot classes (Liu et al., CVPR 2019; Kang et al., ICLR 2020)."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

ShotRule = Literal["counts", "share", "index"]
GROUPS = ("many", "medium", "few")
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Integer types that class indices may have."""


def shot_groups(
    class_counts: Sequence[int], rule: ShotRule, ranges: Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[int]]:
    """Assign each class to many, medium or few.

    ``counts``: many above 100 training images, few below 20, else medium (Kang et al.). ``share``: classes are sorted
    by falling count (ties by index), and c is the cumulative share of images up to and including the class: many if
    c <= 0.75, medium if c <= 0.95, else few. ``index``: explicit ranges of class indices.

    Args:
        class_counts: Training images per class, by class index.
        rule: The rule to apply.
        ranges: For ``index``: group name -> first and last class index, both included.

    Returns:
        Group name -> sorted class indices. Groups may be empty.

    Raises:
        ValueError: If the ranges are missing, overlap or name unknown classes.

    Example:
        >>> shot_groups([4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49], "share")
        {'many': [0, 1], 'medium': [2, 3, 4], 'few': [5, 6, 7, 8, 9]}
    """
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    match rule:
        case "counts":
            for label, count in enumerate(class_counts):
                groups["many" if count > 100 else "few" if count < 20 else "medium"].append(label)
        case "share":
            total, so_far = sum(class_counts), 0
            for label in sorted(range(len(class_counts)), key=lambda label: (-class_counts[label], label)):
                so_far += class_counts[label]
                # integers, so that 75 % and 95 % are met exactly
                group = "many" if 100 * so_far <= 75 * total else "medium" if 100 * so_far <= 95 * total else "few"
                groups[group].append(label)
        case "index":
            return _index_groups(len(class_counts), ranges)
        case _:
            raise ValueError(f"Expected `shot_rule` to be counts, share or index, got {rule!r}.")
    return {name: sorted(members) for name, members in groups.items()}


def _index_groups(num_classes: int, ranges: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    if not ranges or not all(len(pair) == 2 and pair[0] <= pair[1] for pair in ranges.values()):
        raise ValueError(
            "Expected `shot_ranges` to give first and last class of each group for `shot_rule` index, "
            f"for example {{many: [0, 2], medium: [3, 6], few: [7, 9]}}, got {ranges}."
        )
    inside = all(first >= 0 and last < num_classes for first, last in ranges.values())
    groups = {name: list(range(first, last + 1)) for name, (first, last) in ranges.items()} if inside else {}
    members = [label for group in groups.values() for label in group]
    if not inside or len(set(members)) < len(members):
        raise ValueError(f"Expected `shot_ranges` to be disjoint within 0..{num_classes - 1}, got {dict(ranges)}.")
    return groups


class ShotAccuracy(Metric):
    """Accuracy over all examples, per class, and averaged over the classes of each shot group.

    ``compute`` returns the accuracy over all examples (micro average), a scalar; it is NaN before the first example.
    :meth:`accuracies` returns a dictionary with ``acc`` (the same number), ``acc_<group>`` (mean of the per-class
    accuracies of the group) and ``acc_class_<c>``. A class that never occurred as a target is left out, not counted as
    0; a group with only such classes has no entry.

    In a LightningModule, ``self.log("test/acc", metric)`` in a step logs the overall accuracy. At the end of an epoch,
    ``self.log_dict(metric.accuracies())`` logs all accuracies; call ``metric.reset()`` afterwards.

    Args:
        num_classes: Number of classes C.
        groups: Group name -> class indices, for example from :func:`shot_groups`; by default no groups. A class may be
            in several groups.
        options: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_classes`` is not a number of classes, if the name of a group is not a text or begins with
            ``class_``, or if a group contains something other than a class, or a class twice.

    Example:
        >>> metric = ShotAccuracy(3, {"many": [0], "few": [1, 2]})
        >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.6667)
        >>> {name: float(value) for name, value in metric.accuracies().items()}
        {'acc': 0.6666666865348816, 'acc_many': 1.0, 'acc_few': 0.5, 'acc_class_0': 1.0, 'acc_class_1': 0.5}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    num_classes: int
    groups: dict[str, list[int]]
    counts: Tensor

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"Expected `num_classes` to be a whole number of 1 or more, got {num_classes!r}.")
        self.num_classes = int(num_classes)
        self.groups = {name: _members(name, members, self.num_classes) for name, members in (groups or {}).items()}
        self.add_state("counts", torch.zeros(self.num_classes, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Predicted classes (integers of shape (N,)) or scores (floating point, shape (N, C)). NaN counts as
                the largest score, as in torch and torchmetrics, so the test of a model that has diverged runs to its
                end and reports a loss of NaN.
            target: True classes, integers of shape (N,).

        Raises:
            ValueError: If shapes, types or classes are not as described.
        """
        target = self._classes("target", target)
        if not isinstance(preds, Tensor):
            raise ValueError(f"Expected `preds` to be a tensor, got a {type(preds).__name__}.")
        scores = preds.ndim == 2
        if preds.shape != ((*target.shape, self.num_classes) if scores else target.shape):
            raise ValueError(
                f"Expected `preds` to be classes of shape ({len(target)},) or scores of shape ({len(target)}, "
                f"{self.num_classes}) as there are {len(target)} targets, got shape {tuple(preds.shape)}."
            )
        if scores and not preds.is_floating_point():
            raise ValueError(f"Expected `preds` of shape (N, C) to be floating-point scores, got {preds.dtype}.")
        predicted = preds.argmax(1) if scores else self._classes("preds", preds)
        cells = torch.bincount(2 * target + (predicted == target), minlength=2 * self.num_classes)
        # column 0: wrong, column 1: right; not in place, because tensors from a test in inference mode do not allow it
        self.counts = self.counts + cells.view(self.num_classes, 2)

    def compute(self) -> Tensor:
        """Return the accuracy over all examples, a scalar; NaN if there were no examples."""
        return self.counts[:, 1].sum() / self.counts.sum()

    def accuracies(self) -> dict[str, Tensor]:
        """Return the accuracies by name (see the class) over the examples of all processes, as ``compute`` does."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._by_name()

    def _by_name(self) -> dict[str, Tensor]:
        totals, correct = self.counts.sum(1), self.counts[:, 1]
        per_class = correct / totals  # NaN where absent, dropped below
        present = (totals > 0).tolist()
        result = {"acc": correct.sum() / totals.sum()} if any(present) else {}
        for name, members in self.groups.items():
            seen = [label for label in members if present[label]]
            if seen:
                result[f"acc_{name}"] = per_class[seen].mean()
        result.update({f"acc_class_{label}": per_class[label] for label in range(self.num_classes) if present[label]})
        return result

    def _classes(self, name: str, labels: Tensor) -> Tensor:
        """Check class indices, and return them in a type that can also hold twice their value."""
        if not isinstance(labels, Tensor) or labels.dtype not in WHOLE:
            found = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise ValueError(f"Expected `{name}` to be a tensor of classes, whole numbers, got {found}.")
        if labels.ndim != 1:
            raise ValueError(f"Expected `{name}` to have shape (N,), got {tuple(labels.shape)}.")
        labels = labels.long()
        if ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(
                f"Expected `{name}` to hold classes 0 to {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}."
            )
        return labels


def _members(name: str, members: Sequence[int], num_classes: int) -> list[int]:
    """Check a group of classes, and return it as a list.

    Raises:
        ValueError: See :class:`ShotAccuracy`.
    """
    if not isinstance(name, str) or not name or name.startswith("class_"):
        raise ValueError(f"Expected names of `groups` to be texts that do not begin with class_, got {name!r:.60}.")
    members = list(members)
    if not all(isinstance(label, Integral) and not isinstance(label, bool) for label in members):
        raise ValueError(f"Expected `groups` to hold classes, whole numbers, got {members!r:.60} for {name}.")
    if len(set(members)) < len(members) or not all(0 <= label < num_classes for label in members):
        raise ValueError(
            f"Expected `groups` to hold each class of 0 to {num_classes - 1} once at most, got {members!r:.60} for {name}."
        )
    return [int(label) for label in members]
