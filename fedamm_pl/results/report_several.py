"""Content of the report of several runs: a comparison of their methods, a row for each run, and each run's details."""

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedamm_pl.federation.summary import chosen_on
from fedamm_pl.results.comparison_names import comparison_names
from fedamm_pl.results.figures import accuracy_against_bytes, comparison
from fedamm_pl.results.html import Picture, picture
from fedamm_pl.results.paired_figures import forest, rank_diagram
from fedamm_pl.results.paired_tables import LEGEND, difference_cells, rank_cells, rank_legend, shared_seeds
from fedamm_pl.results.pairs import Paired, Ranks, default_reference, pair, rank_within
from fedamm_pl.results.report_facts import joined, known, megabytes, options, percent, rounds, seconds, totals
from fedamm_pl.results.report_one import attempted, view
from fedamm_pl.results.runs import Run
from fedamm_pl.results.tables import BOLD, COSTS, KINDS, Cells, accuracies, plain, row, stacked, table, titles

MAX_RUNS_WITH_FIGURES = 6  # with figures of more runs, a page is slow to open
IRRELEVANT = ("seed", "data.root", "logger", "output.")  # options in which runs of the same experiment may differ
COMPARISON = (
    "Large marks are means over the seeds of the mean of the last evaluations (ten, if there are as many), with the mean's 95 % "
    "interval by Student's t; small dots are seeds. To tell methods apart, look at the paired differences."
)
BYTES = "A curve further to the left reaches the same accuracy with less communication."
FOREST = "Mean differences with their 95 % intervals; small dots are seeds. In the grey band a difference is below half a point."
RANKED = "Bars join methods that Nemenyi's test at 0.05 does not tell apart."
METHODS = (
    "Test accuracy in percent, mean ± standard deviation over the seeds. {bold} {best} † uses the server's balanced examples, "
    "which the others do not have. Unfinished and stopped runs are left out."
)
BEST = {
    "test": "Best was chosen on the test set and is therefore optimistic.",
    "validation": "Best is the round with the highest accuracy on the validation set.",
    "test or validation": (
        "Best is the round with the highest accuracy on the validation set. Without one it was chosen on the test set: such a figure is "
        "optimistic and does not compare with the others."
    ),
}


def several(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the content of the page of several runs."""
    names, with_figures = labels(runs), len(runs) <= MAX_RUNS_WITH_FIGURES
    each = [
        (f"{joined(name, seed_of(run))} ({run.path})", view(run, with_figures))
        for run, name in zip(runs, names, strict=True)
    ]
    return {
        "title": joined(f"{len(runs)} runs", *sorted({run.dataset for run in runs} - {""})),
        "notes": repeated(runs, names),
        **methods(runs, names),
        "lines": run_lines(runs, names),
        **paired(runs),
        "each": each,
    }


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their method and by the options that differ; runs with the same name differ in their seeds only."""
    flats = [options(run) for run in runs]
    return named(runs, flats, differing(flats))


def named(runs: Sequence[Run], flats: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Name runs by their method and by options.

    If a run belongs to a comparison, its method has the name that the comparison gives it, without the options of the
    algorithm that are the same in all runs of this name.

    Args:
        runs: The runs.
        flats: The options of each run.
        names: The options that may appear in the names.
    """
    given = comparison_names(runs)
    same: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run, flat, name in zip(runs, flats, given, strict=True):
        if name is not None:
            same.setdefault(name, []).append((run, flat))
    kept = {name: differing([flat for _, flat in members]) for name, members in same.items()}
    one_class = {name for name, members in same.items() if len({run.method for run, _ in members}) == 1}
    found = []
    for run, flat, name in zip(runs, flats, given, strict=True):
        if name in one_class:
            own = [option for option in names if not option.startswith("algorithm.") or option in kept[name]]
            found.append(joined(name, said(flat, own)))
        else:
            found.append(joined(run.method, said(flat, names)))
    return found


def differing(flats: Sequence[dict[str, Any]]) -> list[str]:
    """Return the options that differ between runs, except those in which runs of the same experiment may differ."""
    names = dict.fromkeys(name for flat in flats for name in flat)
    return [
        name
        for name in names
        if name != "algorithm"
        and not name.startswith(IRRELEVANT)
        and len({repr(flat[name]) for flat in flats if name in flat}) > 1
    ]


def said(flat: dict[str, Any], names: Sequence[str]) -> str:
    """Return the named options of a run as text."""
    return joined(*(f"{name.rpartition('.')[2]} {flat[name]}" for name in names if name in flat))


def seed_of(run: Run) -> str | None:
    """Return the seed as text; None if it is unknown."""
    return known("seed {}", run.seed)


def repeated(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return a sentence for each seed that a method has run with more than once."""
    seen = collections.Counter(joined(name, seed_of(run)) for run, name in zip(runs, names, strict=True))
    return [f"{times} runs are {name}: the spread is too small." for name, times in seen.items() if times > 1]


def run_lines(runs: Sequence[Run], names: Sequence[str]) -> Cells:
    """Return the table of the runs: a line for each."""
    chosen = [chosen_on(run.results["final"]) for run in runs if run.history]
    kinds = (f"all, {title}" for title in titles((run.num_averaged for run in runs), chosen).values())
    above = common_folder(runs)
    lines = [["run", "seed", "rounds", *kinds, *COSTS.values(), f"folder in {above}" if above.parts else "folder"]]
    for run, name in zip(runs, names, strict=True):
        state = rounds(run).removesuffix(" rounds") + ("" if run.summary else ", unfinished")
        results = [percent(run.results[kind]["test/acc"]) if run.history else "" for kind in KINDS]
        cost = [known("{:.2f}", megabytes(run)) or "", f"{total:.2f}" if (total := sum(seconds(run).values())) else ""]
        lines.append(
            [
                name,
                known("{}", run.seed) or "",
                state,
                *results,
                *cost,
                str(run.path.relative_to(above) if above.parts else run.path),
            ]
        )
    return plain(lines)


def common_folder(runs: Sequence[Run]) -> Path:
    """Return the folder that contains all runs; an empty path if there is none."""
    try:
        return Path(os.path.commonpath([run.path.parent for run in runs]))
    except ValueError:  # relative and absolute paths, or several drives
        return Path()


def methods(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """Return the table and the figures of the methods, over the finished runs."""
    rows = [
        row(name, run.seed or 0, {}, {**run.summary, "num_averaged": run.num_averaged})
        for run, name in zip(runs, names, strict=True)
        if run.summary is not None and not run.summary["stopped"]
    ]
    if not rows:
        return {"methods": []}
    pictures, missing = attempted(lambda: drawn(runs, names, rows))
    best = BEST[" or ".join(sorted({row.get("best_on", "test") for row in rows}))]
    legend = METHODS.format(best=best, bold=BOLD)
    cells = stacked(table(rows, by_setting(runs, names)))
    return {"methods": cells, "legend": legend, "missing": missing, "pictures": pictures}


def by_setting(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[str]]:
    """Return setting of the data -> the methods that ran on it; empty if there is only one setting.

    Results on different data cannot be compared.
    """
    flats = [options(run) for run in runs]
    settings: dict[str, dict[str, None]] = {}
    for flat, name in zip(flats, names, strict=True):
        settings.setdefault(said(flat, data_options(flats)), {})[name] = None
    if len(settings) == 1:
        return {}
    return {setting or "unknown options": [*members] for setting, members in settings.items()}


def data_options(flats: Sequence[dict[str, Any]]) -> list[str]:
    """Return the options of the data that differ between runs."""
    return [name for name in differing(flats) if concerns_data(name)]


def concerns_data(name: str) -> bool:
    """Return whether an option, or the class of a group, concerns the data."""
    return name == "data" or name.startswith("data.")


def paired(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the differences between methods on the same seeds: a table for each setting of the data, and figures."""
    every = pairs(runs)
    found = [pair for pair in every if pair.differences or pair.notes]
    shown = {pair.setting: pair for pair in found if pair.differences}
    ranks = rank_within(every)
    pictures, missing = attempted(lambda: drawn_pairs(shown, ranks) if shown else [])
    return {
        "pairs": [
            {
                "setting": pair.setting,
                "seeds": shared_seeds(pair),
                "cells": difference_cells(pair) if pair.differences else [],
                "notes": pair.notes,
            }
            for pair in found
        ],
        "ranks": rank_cells(ranks) if ranks else [],
        "rank_legend": rank_legend(ranks) if ranks else "",
        "pair_legend": LEGEND if shown else "",
        "pairs_missing": missing,
        "pair_pictures": pictures,
    }


def drawn_pairs(shown: dict[str, Paired], ranks: dict[str, Ranks]) -> list[Picture]:
    """Return the figures of the differences."""
    panels = {setting: pair.forest for setting, pair in shown.items()}
    references = {setting: pair.reference for setting, pair in shown.items()}
    figures = [picture(forest(panels, references), "Paired differences", FOREST)]
    return figures + ([picture(rank_diagram(ranks), "Mean ranks", RANKED)] if ranks else [])


def pairs(runs: Sequence[Run]) -> list[Paired]:
    """Return, for each setting of the data, its methods compared on the seeds that all share.

    Settings are kept apart, since other data have other splits. Methods with a run that is not finished, was stopped or
    has diverged, with a run without a seed, or with two runs of a seed are left out.
    """
    flats = [options(run) for run in runs]
    names = differing(flats)
    methods = named(runs, flats, [name for name in names if not concerns_data(name)])
    settings: dict[str, list[tuple[str, Run]]] = {}
    for run, flat, method in zip(runs, flats, methods, strict=True):
        setting = said(flat, data_options(flats))
        settings.setdefault(setting, []).append((method, run))
    found = []
    for setting, members in settings.items():
        left_out: dict[str, list[str]] = {}
        for (method, seed), times in collections.Counter((method, run.seed) for method, run in members).items():
            if times > 1 or seed is None:
                left_out.setdefault(method, []).append("no seed" if seed is None else f"{times} runs of seed {seed}")
        for method, run in members:
            if run.summary is None or run.summary["stopped"] or run.summary.get("diverged"):
                how = "is not finished" if run.summary is None else "stopped" if run.summary["stopped"] else "diverged"
                left_out.setdefault(method, []).append(f"seed {run.seed} {how}")
        rows = [
            row(method, run.seed or 0, {}, {**run.summary, "num_averaged": run.num_averaged})
            for method, run in members
            if run.summary is not None and method not in left_out
        ]
        first = default_reference([method for method, _ in members])
        found.append(pair(rows, {name: ", ".join(why) for name, why in left_out.items()}, first, setting))
    return found


def drawn(runs: Sequence[Run], names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """Return the figures of the methods."""
    figures = [picture(comparison({"": accuracies(rows)}), "Methods", COMPARISON)]
    if curves := byte_curves(runs, names):
        figures.append(picture(accuracy_against_bytes({"": curves}), "Accuracy against bytes", BYTES))
    return figures


def byte_curves(
    runs: Sequence[Run], names: Sequence[str]
) -> dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Return label -> (bytes so far, accuracy) of each of its runs; runs without known bytes are left out."""
    curves: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for run, name in zip(runs, names, strict=True):
        sent = {row["round"]: row["bytes"] for row in totals(run)}
        points = [(sent[row["round"]], row["test/acc"]) for row in run.history if row["round"] in sent]
        if points:
            both = np.array(points, dtype=np.float64)
            curves.setdefault(name, []).append((both[:, 0], both[:, 1]))
    return curves
