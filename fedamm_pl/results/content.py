"""What the files of a run hold: their content is checked against this description once, when it is read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fedamm_pl.algorithms.meta.tallies import FAMILY_CURVES
from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.results.kinds import (
    MAX_TEXT,
    FieldError,
    Kind,
    expected,
    fields,
    flag,
    inside,
    items,
    mapping,
    nullable,
    number,
    text,
    whole,
)

MAX_CLASSES, MAX_CLIENTS, MAX_ROUNDS, MAX_GROUPS = 50_000, 1_000_000, 1_000_000, 100
"""More than a run has: ImageNet-21k has 21,841 classes."""
MAX_COLUMNS = 2 * MAX_CLASSES + 2_000  # on the test set and on the validation set
KINDS = ("final", "best", "mean_last_10")

ACCURACIES = ("test/acc", "val/acc", "local/acc")
SHARE = number(0, 1)
OTHER_ACCURACY, OTHER_METRIC = nullable(number(-1e6, 1e6)), nullable(number(-1e308, 1e308))


def metric(name: str) -> Kind:
    """Describe the value of a metric; the loss of a model that has diverged is null."""
    return SHARE if name in SHOWN else OTHER_ACCURACY if name.startswith(ACCURACIES) else OTHER_METRIC


def best(name: str) -> Kind:
    """Describe the best of a metric, and its round."""
    return fields({"value": metric(name), "round": whole(MAX_ROUNDS)})


def all_of(kind: Kind) -> Kind:
    """Describe a few names with values of one kind."""
    return mapping(lambda _: kind, MAX_GROUPS)


AMOUNT, AMOUNTS = number(0), all_of(number(0))
COUNTS = items(whole(), MAX_CLASSES)
MEMBERS = all_of(items(whole(), MAX_CLASSES))
SEEN = nullable(items(nullable(number(-1e9, 1e9)), MAX_CLASSES))
LONG = text(MAX_TEXT)
HARDWARE: Kind = lambda value: (whole() if isinstance(value, int) else text())(value)  # noqa: E731
CURVE = fields(
    {"round": items(whole(MAX_ROUNDS), MAX_ROUNDS), "bytes": items(AMOUNT, MAX_ROUNDS)},
    dict.fromkeys((*SHOWN, "val/acc"), items(SHARE, MAX_ROUNDS)),
)

SUMMARY = fields(
    {
        "final": mapping(metric, MAX_COLUMNS),
        "best": mapping(best, MAX_COLUMNS),
        "mean_last_10": mapping(metric, MAX_COLUMNS),
        "num_rounds": whole(MAX_ROUNDS),
        "method": text(),
        "dataset": text(),
        "seed": whole(),
        "imbalance_factor": SHARE,
        "IF": nullable(number(1)),
        "uses_meta_set": flag,
        "bytes_per_round": fields(
            dict.fromkeys(("received", "sent", "received_per_client", "sent_per_client"), AMOUNT)
        ),
        "seconds_per_round": AMOUNTS,
        "client_seconds_per_round": AMOUNTS,
        "stopped": nullable(LONG),
        "ended": nullable(LONG),
        **dict.fromkeys(("failed_clients", "refused_updates", "failed_rounds", "resumes"), whole()),
    },
    {
        "num_averaged": whole(MAX_ROUNDS),
        "diverged": nullable(fields({"round": whole(MAX_ROUNDS), "reason": LONG})),
        "model": text(),
        **dict.fromkeys(
            ("unused_images", "validation_examples", "local_test_examples", "clients_without_local_test"), whole()
        ),
        "num_parameters": whole(),
        "class_counts": COUNTS,
        "shot_groups": MEMBERS,
        "versions": all_of(text()),
        "hardware": all_of(HARDWARE),
        "command": LONG,
        "curve": CURVE,
    },
)
ROUND = fields(
    {"round": whole(MAX_ROUNDS), "bytes": AMOUNT, "seconds": AMOUNTS, "client_seconds": AMOUNTS},
    dict.fromkeys(("weight_curve", *FAMILY_CURVES, "weight_per_class", "loss_histogram"), SEEN),
)
DIAGNOSTICS = fields(
    {
        "class_names": items(text(), MAX_CLASSES),
        "class_counts": COUNTS,
        "shot_groups": MEMBERS,
        "rounds": items(ROUND, MAX_ROUNDS),
    },
    {
        "client_class_counts": nullable(items(COUNTS, MAX_CLIENTS)),
        "client_names": nullable(items(text(), MAX_CLIENTS)),
        "confusion": nullable(items(COUNTS, MAX_CLASSES)),
        "client_accuracies": items(nullable(SHARE), MAX_CLIENTS),
        "losses": nullable(items(number(0, 1e9), MAX_CLASSES)),
    },
)


def check_summary(content: Any) -> None:
    """Check the content of summary.json.

    Raises:
        ValueError: If it is not as a run writes it; the message names the field.
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
        ValueError: If it is not as a run writes it, or its lists do not fit together; the message names the field.
    """
    DIAGNOSTICS(content)
    counts, matrix, losses = content["class_counts"], content.get("confusion"), content.get("losses") or ()
    _check_groups(content)
    _check_length("class_names", content["class_names"], "class_counts", counts)
    for index, row in enumerate(content.get("client_class_counts") or ()):
        _check_length(f"client_class_counts[{index}]", row, "class_counts", counts)
    if content.get("client_names"):
        clients = content.get("client_class_counts") or ()
        _check_length("client_names", content["client_names"], "client_class_counts", clients)
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
        ValueError: If it is not as a run writes it; the message names the column, and the row, the first being 1.
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
    """Check those options of a configuration that are shown as numbers.

    Raises:
        ValueError: If one is none; the message names it.
    """
    for name, kind in {"seed": whole(), "federation.client_fraction": SHARE}.items():
        inside(name, nullable(kind), flat.get(name))


def check_together(summary: Mapping[str, Any] | None, diagnostics: Mapping[str, Any] | None) -> None:
    """Check that both files are of one run.

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
    """Return the error that there is no such class."""
    return FieldError(expected(f"a class from 0 to {num_classes - 1}", label).said, where)
