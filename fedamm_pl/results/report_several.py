"""What a report says of several runs: their methods compared, a line for each run, and each run folded up."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedamm_pl.federation.summary import chosen_on
from fedamm_pl.results.figures import accuracy_against_bytes, comparison
from fedamm_pl.results.html import embedded, escaped, folded, gallery, tabular
from fedamm_pl.results.paired_figures import forest, rank_diagram
from fedamm_pl.results.paired_tables import LEGEND, difference_cells, rank_cells, rank_legend, shared_seeds
from fedamm_pl.results.pairs import Paired, Ranks, default_reference, pair, rank_within
from fedamm_pl.results.report_one import (
    attempted,
    joined,
    known,
    megabytes,
    options,
    percent,
    rounds,
    seconds,
    sections,
    totals,
)
from fedamm_pl.results.runs import Run
from fedamm_pl.results.tables import COSTS, KINDS, Cells, accuracies, plain, row, stacked, table, titles

MAX_RUNS_WITH_FIGURES = 6  # a page of more takes long to open
IRRELEVANT = ("seed", "data.root", "logger", "output.")  # what does not make a run another experiment
COMPARISON = (
    "Large dots are means of the last evaluations (ten, where there are as many) over the seeds, with their standard deviation; "
    "small dots are seeds. Methods whose bars overlap are not told apart by these runs."
)
BYTES = "The further left a curve rises, the less it costs to be as good; where curves cross, the budget decides."
FOREST = "Mean differences with their 95 % intervals; small dots are seeds. In the grey band a difference is below half a point."
RANKED = "Bars join methods that Nemenyi's test at 0.05 does not tell apart."
METHODS = (
    "Test accuracy in percent, mean ± standard deviation over the seeds. Bold: the highest mean, if there are three seeds or more "
    "of each method and its bar (mean ± standard deviation) lies above all others. {best} † uses the server's balanced examples, "
    "which the others do not have. Unfinished and stopped runs are left out."
)
BEST = {
    "test": "Best is chosen on the test set: an optimistic figure.",
    "validation": "Best is of the round with the highest accuracy on the validation set.",
    "test or validation": "Best is of the round with the highest accuracy on the validation set; without one it is chosen on the test set: an optimistic figure, which does not compare with the other.",
}


def several(runs: Sequence[Run]) -> tuple[str, str]:
    """Return title and body of the page of several runs."""
    names = labels(runs)
    title = joined(f"{len(runs)} runs", *sorted({run.dataset for run in runs} - {""}))
    with_figures = len(runs) <= MAX_RUNS_WITH_FIGURES
    parts = [
        f"<h1>{escaped(title)}</h1>",
        *(f'<p class="note">{escaped(note)}</p>' for note in repeated(runs, names)),
        "<h2>Methods</h2>",
        *methods(runs, names),
        "<h2>Runs</h2>",
        tabular(run_lines(runs, names)),
        *paired_sections(runs),
        "<h2>Each run</h2>",
        *(
            folded(
                f"{joined(name, seed_of(run))} ({run.path})",
                f'<section class="run">{sections(run, with_figures)}</section>',
            )
            for run, name in zip(runs, names, strict=True)
        ),
    ]
    return title, "\n".join(parts)


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their method and by what differs between them; runs of one name differ in their seeds alone."""
    flats = [options(run) for run in runs]
    names = differing(flats)
    return [joined(run.method, said(flat, names)) for run, flat in zip(runs, flats, strict=True)]


def differing(flats: Sequence[dict[str, Any]]) -> list[str]:
    """Return the options that differ between runs, but for those that make no other experiment."""
    names = dict.fromkeys(name for flat in flats for name in flat)
    return [
        name
        for name in names
        if name != "algorithm"
        and not name.startswith(IRRELEVANT)
        and len({repr(flat[name]) for flat in flats if name in flat}) > 1
    ]


def said(flat: dict[str, Any], names: Sequence[str]) -> str:
    """Return options of a run in words."""
    return joined(*(f"{name.rpartition('.')[2]} {flat[name]}" for name in names if name in flat))


def seed_of(run: Run) -> str | None:
    """Return the seed in words."""
    return known("seed {}", run.seed)


def repeated(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return a sentence for each seed that a method has run with twice."""
    seen = collections.Counter(joined(name, seed_of(run)) for run, name in zip(runs, names, strict=True))
    return [f"{times} runs are {name}: the spread is too small." for name, times in seen.items() if times > 1]


def run_lines(runs: Sequence[Run], names: Sequence[str]) -> Cells:
    """Return a line for each run."""
    chosen = [chosen_on(run.results["final"]) for run in runs if run.history]
    kinds = (f"all, {title}" for title in titles((run.num_averaged for run in runs), chosen).values())
    lines = [["run", "seed", "rounds", *kinds, *COSTS.values(), "folder"]]
    for run, name in zip(runs, names, strict=True):
        state = rounds(run).removesuffix(" rounds") + ("" if run.summary else ", unfinished")
        results = [percent(run.results[kind]["test/acc"]) if run.history else "" for kind in KINDS]
        cost = [known("{:.2f}", megabytes(run)) or "", f"{total:.2f}" if (total := sum(seconds(run).values())) else ""]
        lines.append([name, known("{}", run.seed) or "", state, *results, *cost, str(run.path)])
    return plain(lines)


def methods(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the table and the figures of the methods, over the finished runs."""
    rows = [
        row(name, run.seed or 0, {}, {**run.summary, "num_averaged": run.num_averaged})
        for run, name in zip(runs, names, strict=True)
        if run.summary is not None and not run.summary["stopped"]
    ]
    if not rows:
        return ["<p>None of the runs has finished yet.</p>"]
    figures, missing = attempted(lambda: drawn(runs, names, rows))
    note = [f'<p class="note">{escaped(missing)}</p>'] if missing else []
    legend = METHODS.format(best=BEST[" or ".join(sorted({row.get("best_on", "test") for row in rows}))])
    return [tabular(stacked(table(rows))), f'<p class="soft">{legend}</p>', *note, gallery(figures)]


def paired_sections(runs: Sequence[Run]) -> list[str]:
    """Return the differences between methods on the same seeds, a table for each setting of the data, with figures."""
    found = pairs(runs)
    shown = {paired.setting: paired for paired in found if paired.differences}
    parts = []
    for paired in found:
        title = f"<p><strong>{escaped(paired.setting)}</strong></p>" if paired.setting else ""
        body = [f"<p>{escaped(shared_seeds(paired))}</p>", tabular(difference_cells(paired))]
        notes = [f'<p class="note">{escaped(note)}</p>' for note in paired.notes]
        parts += [title, *(body if paired.differences else []), *notes] if paired.differences or notes else []
    if ranks := rank_within(found):
        parts += [tabular(rank_cells(ranks)), f'<p class="soft">{escaped(rank_legend(ranks))}</p>']
    if shown:
        parts.append(f'<p class="soft">{escaped(LEGEND)}</p>')
        figures, missing = attempted(lambda: drawn_pairs(shown, ranks))
        parts += [f'<p class="note">{escaped(missing)}</p>'] if missing else [gallery(figures)]
    return ["<h2>Paired differences</h2>", *parts] if parts else []


def drawn_pairs(shown: dict[str, Paired], ranks: dict[str, Ranks]) -> list[str]:
    """Return the figures of the differences."""
    panels = {setting: paired.forest for setting, paired in shown.items()}
    references = {setting: paired.reference for setting, paired in shown.items()}
    figures = [embedded(forest(panels, references), "Paired differences", FOREST)]
    return figures + ([embedded(rank_diagram(ranks), "Mean ranks", RANKED)] if ranks else [])


def pairs(runs: Sequence[Run]) -> list[Paired]:
    """Return the methods of each setting of the data on the seeds that all share; other data have other splits.

    Methods with a run that is not finished, was stopped or has diverged, and those with two runs of a seed, are left out.
    """
    flats = [options(run) for run in runs]
    names = differing(flats)
    settings: dict[str, list[tuple[str, Run]]] = {}
    for run, flat in zip(runs, flats, strict=True):
        method = joined(run.method, said(flat, [name for name in names if not name.startswith("data.")]))
        setting = said(flat, [name for name in names if name.startswith("data.")])
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


def drawn(runs: Sequence[Run], names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures of the methods."""
    figures = [embedded(comparison({"": accuracies(rows)}), "Methods", COMPARISON)]
    if curves := byte_curves(runs, names):
        figures.append(embedded(accuracy_against_bytes({"": curves}), "Accuracy against bytes", BYTES))
    return figures


def byte_curves(
    runs: Sequence[Run], names: Sequence[str]
) -> dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Return label -> bytes so far and accuracy of each of its runs that tells its bytes."""
    curves: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for run, name in zip(runs, names, strict=True):
        sent = {row["round"]: row["bytes"] for row in totals(run)}
        points = [(sent[row["round"]], row["test/acc"]) for row in run.history if row["round"] in sent]
        if points:
            both = np.array(points, dtype=np.float64)
            curves.setdefault(name, []).append((both[:, 0], both[:, 1]))
    return curves
