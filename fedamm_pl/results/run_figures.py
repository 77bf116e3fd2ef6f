"""Figures of one run, drawn from the content of its files."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedamm_pl.algorithms.meta.tallies import FAMILY_CURVES
from fedamm_pl.results.client_figure import client_accuracy
from fedamm_pl.results.figures import (
    accuracy,
    class_accuracy,
    class_counts,
    class_weights,
    confusion,
    family_mapping,
    partition,
    weight_mapping,
)


def run_figures(history: Sequence[Mapping[str, float]], diagnostics: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Draw all figures of one run for which there is data.

    Args:
        history: A row for each evaluated round.
        diagnostics: The content of diagnostics.json, or None.

    Returns:
        File name without ending -> figure.
    """
    known = diagnostics or {}
    names, counts, groups = known.get("class_names") or (), known.get("class_counts"), known.get("shot_groups") or {}
    figures = {}
    if counts:
        figures["class_counts"] = class_counts(counts, groups, names)
    if known.get("client_class_counts"):
        figures["partition"] = partition(known["client_class_counts"], names, known.get("client_names") or ())
    if history:
        columns = dict.fromkeys(name for row in history for name in row if name.startswith("test/acc_"))
        found = [name.removeprefix("test/acc_") for name in columns if not name.startswith("test/acc_class_")]
        # a group without a class in the test set has no column, but is listed so that the others keep their colours
        metrics = {"all": "test/acc"} | {name: f"test/acc_{name}" for name in groups or found}
        series = {name: [row.get(metric, np.nan) for row in history] for name, metric in metrics.items()}
        if any("val/acc" in row for row in history):
            series["validation"] = [row.get("val/acc", np.nan) for row in history]
        figures["accuracy"] = accuracy([row["round"] for row in history], series)
    if history and counts:
        rows = [row for row in history if row["round"] > 0] or list(history)
        first, last = (
            [row.get(f"test/acc_class_{c}", np.nan) for c in range(len(counts))] for row in (rows[0], rows[-1])
        )
        before = first if len(rows) > 1 else [np.nan] * len(counts)
        labels = (f"round {rows[0]['round']:.0f}", f"round {rows[-1]['round']:.0f}")
        figures["class_accuracy"] = class_accuracy(counts, before, last, groups, labels)
    if known.get("confusion"):
        figures["confusion"] = confusion(known["confusion"], names)
    at_clients = known.get("client_accuracies") or ()
    measured = {k: value for k, value in enumerate(at_clients) if value is not None and value == value}
    if measured:
        called = known.get("client_names") or range(len(at_clients))
        held = known.get("client_class_counts") or ()
        figures["client_accuracy"] = client_accuracy(
            [*measured.values()],
            [str(called[k]) for k in measured],
            [sum(held[k]) for k in measured] if held else (),
            [sum(count > 0 for count in held[k]) for k in measured] if held else (),
        )
    return figures | _weight_figures(known.get("losses"), known.get("rounds") or (), groups)


def _weight_figures(losses: Any, rounds: Iterable[Mapping[str, Any]], groups: Any) -> dict[str, Figure]:
    """Return the figures of methods that have a weight net."""
    shown = list(rounds)
    curves, weights, histograms = (
        {int(row["round"]): row[key] for row in shown if row.get(key)}
        for key in ("weight_curve", "weight_per_class", "loss_histogram")
    )
    figures, histogram = {}, histograms[max(histograms)] if histograms else None
    if curves:
        figures["weight_mapping"] = weight_mapping(losses, curves, histogram)
    if families := [row for row in shown if row.get(FAMILY_CURVES[0])]:
        last = [families[-1][key] for key in FAMILY_CURVES if families[-1].get(key)]
        figures["weight_mapping"] = family_mapping(losses, last, histogram)
    if weights:
        figures["class_weights"] = class_weights(list(weights), list(weights.values()), groups)
    return figures
