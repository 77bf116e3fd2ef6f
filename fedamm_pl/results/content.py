"""Checks of a run's files when they are read: each field (see :mod:`fedamm_pl.federation.contents`) and consistency."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fedamm_pl.algorithms.meta.tallies import FAMILY_CURVES
from fedamm_pl.federation.contents import (
    ACCURACIES,
    MAX_GROUPS,
    MAX_ROUNDS,
    SHARE,
    Diagnostics,
    Summary,
    metric,
)
from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.kinds import FieldError, described, expected, inside, nullable, text, whole

KINDS = ("final", "best", "mean_last_10")
SUMMARY, DIAGNOSTICS = described(Summary), described(Diagnostics)


def check_summary(content: Any) -> None:
    """Check the content of summary.json.

    Raises:
        ValueError: If it differs from what a run writes; the message names the field.
    """
    SUMMARY(content)
    shown = {"test/acc", *content["final"]} & SHOWN.keys()
    for kind in KINDS:
        if lacking := sorted(shown - content[kind].keys()):
            raise FieldError(f"lacks {', '.join(lacking)}", kind)
    curve = content.get("curve", {"round": []})
    for name, values in curve.items():
        _check_length(f"curve.{name}", values, "curve.round", curve["round"])
    _check_rising("curve.round", curve["round"])
    _check_groups(content)


def check_diagnostics(content: Any) -> None:
    """Check the content of diagnostics.json.

    Raises:
        ValueError: If it differs from what a run writes, or its lists have inconsistent lengths; the message names the
            field.
    """
    DIAGNOSTICS(content)
    counts, matrix, losses = content["class_counts"], content.get("confusion"), content.get("losses") or ()
    _check_groups(content)
    _check_length("class_names", content["class_names"], "class_counts", counts)
    for index, row in enumerate(content.get("client_class_counts") or ()):
        _check_length(f"client_class_counts[{index}]", row, "class_counts", counts)
    clients = content.get("client_class_counts") or ()
    for name in ("client_names", *(["client_accuracies"] if clients else [])):
        if content.get(name):
            _check_length(name, content[name], "client_class_counts", clients)
    for name, row in [("", matrix), *((f"[{index}]", row) for index, row in enumerate(matrix))] if matrix else ():
        _check_length(f"confusion{name}", row, "class_counts", counts)
    _check_rising("losses", losses)
    _check_rising("rounds", [row["round"] for row in content["rounds"]])
    for index, row in enumerate(content["rounds"]):
        for name, other, values in (
            *((key, "losses", losses) for key in ("weight_curve", *FAMILY_CURVES)),
            ("loss_histogram", "losses", losses),
            ("weight_per_class", "class_counts", counts),
        ):
            if row.get(name):
                _check_length(f"rounds[{index}].{name}", row[name], other, values)
                if len(losses) == 1:
                    raise FieldError("should be more than one", "losses")


def check_history(columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Check the content of metrics.csv.

    Raises:
        ValueError: If it differs from what a run writes; the message names the column and the row, counted from 1.
    """
    if len(set(columns)) < len(columns):
        raise ValueError("it has a column twice")
    for name in columns:
        inside("the name of a column", text(), name)
    groups = [name for name in columns if name.startswith("test/acc_") and not name.startswith("test/acc_class_")]
    if len(groups) > MAX_GROUPS:
        raise ValueError(f"it has {len(groups):,} columns of groups, a run has at most {MAX_GROUPS}")
    for index, row in enumerate(rows, 1):
        if missing := [name for name in ("round", "test/acc") if name not in row]:
            raise ValueError(f"row {index} has no {', '.join(missing)}")
        for name, value in row.items():
            if name == "round" and not (value.is_integer() and 0 <= value <= MAX_ROUNDS):
                raise FieldError(
                    f"should be a whole number from 0 to {MAX_ROUNDS:,}, got {value}", f"round in row {index}"
                )
            if name.startswith(ACCURACIES) and not math.isnan(value):
                inside(f"{name} in row {index}", metric(name), value)
    _check_rising("round", [row["round"] for row in rows])


def check_options(flat: Mapping[str, Any]) -> None:
    """Check the options of a configuration that are shown as numbers.

    Raises:
        ValueError: If one of them is not a number in its range; the message names it.
    """
    for name, kind in {"seed": whole(), "federation.client_fraction": SHARE}.items():
        inside(name, nullable(kind), flat.get(name))


def check_together(summary: Mapping[str, Any] | None, diagnostics: Mapping[str, Any] | None) -> None:
    """Check that both files belong to the same run.

    Raises:
        ValueError: If they differ in their number of classes.
    """
    both = [len(content["class_counts"]) for content in (summary, diagnostics) if content and "class_counts" in content]
    if len(set(both)) > 1:
        raise ValueError(
            "Expected summary.json and diagnostics.json to be of one run, got {:,} and {:,} classes".format(*both)
        )


def _check_length(where: str, values: Sequence[Any], other: str, wanted: Sequence[Any]) -> None:
    if len(values) != len(wanted):
        raise FieldError(f"should be as long as {other}, {len(wanted):,}, got {len(values):,}", where)


def _check_rising(where: str, values: Iterable[float]) -> None:
    if any(second <= first for first, second in pairwise(values)):
        raise FieldError("should rise from one to the next", where)


def _check_groups(content: Mapping[str, Any]) -> None:
    num_classes = len(content.get("class_counts", ()))
    for name, members in content.get("shot_groups", {}).items():
        for index, label in enumerate(members):
            if label >= num_classes:
                raise expected_class(num_classes, label, f"shot_groups.{name}[{index}]")


def expected_class(num_classes: int, label: int, where: str) -> FieldError:
    """Return the error for a class index out of range."""
    return FieldError(expected(f"a class from 0 to {num_classes - 1}", label).said, where)
