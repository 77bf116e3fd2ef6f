"""Comparison at equal communication: each run counts up to the bytes of the cheapest run of its setting and seed."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedamm_pl.federation.summary import within
from fedamm_pl.results.comparison import PlannedRun
from fedamm_pl.results.tables import by_method

Summaries = Sequence[tuple[PlannedRun, dict[str, Any]]]
"""Finished runs with the contents of their summary.json."""


def at_equal_bytes(found: Summaries) -> Summaries:
    """Cut the summary of each run at the total bytes of the cheapest run with the same setting and seed.

    A summary then covers the run up to its last evaluation within these bytes.

    Raises:
        ValueError: If the summary of a run has no bytes, or a run has no evaluation within the budget; the message
            names it.
    """
    totals: dict[str, list[float]] = {}
    for run, summary in found:
        if not summary.get("curve", {}).get("bytes"):
            raise ValueError(
                f"Expected all runs to tell their bytes in summary.json for `budget` bytes, got {run} without them. An earlier "
                f"version has made it: remove {run.folder} to run it again, or use `budget` rounds."
            )
        totals.setdefault(run.place, []).append(summary["curve"]["bytes"][-1])
    cut = []
    for run, summary in found:
        budget = min(totals[run.place])
        if (part := within(summary, budget)) is None:
            raise ValueError(
                f"Expected all runs to be evaluated within {budget / 1e6:.2f} MB, which the cheapest method exchanges in all, for "
                f"`budget` bytes, got {run}, which is not. Use a smaller `federation.eval_interval`, or `budget` rounds."
            )
        cut.append((run, part))
    return cut


def incomplete(runs: Sequence[PlannedRun]) -> list[str]:
    """Return the settings and seeds, as text, at which a run is not finished: their cheapest run is not known."""
    return list(dict.fromkeys(run.place for run in runs if not run.finished))


def budget_notes(runs: Sequence[PlannedRun], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return notes on the budget: the rounds of each method, what is left out, and runs that ended early.

    Args:
        runs: All planned runs.
        rows: The rows of the runs that :func:`at_equal_bytes` returns.
    """
    notes = [rounds_note(rows)] if rows else []
    if places := incomplete(runs):
        notes.append(f"Left out at the same bytes, since a run is not finished there: {'; '.join(places)}.")
    if ended := [str(run) for run in runs if (summary := run.summary) and summary["ended"]]:
        notes.append(f"These runs ended early, which may lower the budget of their seed: {'; '.join(ended)}.")
    return notes


def rounds_note(rows: Sequence[dict[str, Any]]) -> str:
    """Return a note with the mean number of rounds in which each method exchanges the same bytes.

    Args:
        rows: The rows of the runs that :func:`at_equal_bytes` returns.
    """
    rounds = [f"{name} {mean(row['num_rounds'] for row in mine):.1f}" for name, mine in by_method(rows)]
    return (
        "At the same bytes: each run counts up to its last evaluation within the total that the cheapest method exchanges in all its "
        f"rounds, with the same setting and seed. Mean number of rounds until then: {', '.join(rounds)}."
    )


def byte_curves(found: Summaries) -> dict[str, dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]]:
    """Return setting -> method -> (bytes exchanged so far, test accuracy) of each of its runs."""
    panels: dict[str, dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]] = {}
    for run, summary in found:
        setting = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in run.setting.items())
        curve = {name: np.array(values, dtype=np.float64) for name, values in summary["curve"].items()}
        panels.setdefault(setting, {}).setdefault(run.method, []).append((curve["bytes"], curve["test/acc"]))
    return panels
