"""The files of a comparison: tables and figures. A failure to draw a figure does not affect the tables."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedamm_pl.files import write_atomically
from fedamm_pl.results.budget import Summaries, at_equal_bytes, budget_notes, byte_curves, incomplete
from fedamm_pl.results.comparison import PlannedRun, settings_of
from fedamm_pl.results.comparison_config import Budget
from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.figures import accuracy_against_bytes, comparison
from fedamm_pl.results.paired_figures import forest, rank_diagram
from fedamm_pl.results.paired_tables import (
    LEGEND,
    difference_cells,
    group_notes,
    paired_records,
    rank_cells,
    rank_legend,
    shared_seeds,
)
from fedamm_pl.results.pairs import Paired, Ranks, default_reference, pair, rank_within
from fedamm_pl.results.tables import (
    BOLD,
    accuracies,
    as_csv,
    as_latex,
    as_markdown,
    in_groups,
    latex_text,
    markdown_text,
    over_settings,
    row,
    table,
)
from fedamm_pl.results.tuning import Tuning
from fedamm_pl.results.tuning_tables import tuning_cells, tuning_legend, tuning_notes, tuning_records

log = logging.getLogger(__name__)


def rows(
    runs: Sequence[PlannedRun], groups: Mapping[str, Sequence[str]] | None = None, budget: Budget = "rounds"
) -> list[dict[str, Any]]:
    """Return the rows of the finished runs; if there are groups, with the title of each method's group.

    Raises:
        ValueError: If the runs cannot be compared at the same bytes, see :func:`~fedamm_pl.results.budget.at_equal_bytes`.
    """
    found = finished(runs)
    if equal := budget == "bytes":
        unknown = incomplete(runs)
        found = at_equal_bytes([(run, summary) for run, summary in found if run.place not in unknown])
    titles = {
        name: title for title, members in in_groups((run.method for run in runs), groups or {}) for name in members
    }
    return [
        ({"group": titles[run.method]} if groups else {})
        | row(run.method, run.seed, run.setting, summary)
        | ({"num_rounds": summary["num_rounds"]} if equal else {})
        for run, summary in found
    ]


def finished(runs: Sequence[PlannedRun]) -> Summaries:
    """Return the finished runs with their summaries."""
    return [(run, summary) for run in runs if (summary := run.summary)]


def settings(runs: Sequence[PlannedRun], found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each setting as text, with its rows."""
    for setting in settings_of(runs):
        members = [row for row in found if all(row[name] == value for name, value in setting.items())]
        if members:
            yield ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in setting.items()), members


def pairs(
    runs: Sequence[PlannedRun], found: Sequence[dict[str, Any]], reference: str | None = None
) -> dict[str, Paired]:
    """Return setting as text -> its methods, compared on the seeds that all share.

    Methods with a run that failed or diverged are left out.

    Args:
        runs: All planned runs.
        found: Rows of the finished runs.
        reference: The method that the others are compared with.
    """
    compared = {}
    for setting, members in settings(runs, found):
        values = {name: members[0][name] for name in runs[0].setting}
        mine = [run for run in runs if run.setting == values]
        reasons = {method: ", ".join(found) for method, found in _left_out(mine, "seed {run.seed}").items()}
        first = reference or default_reference(list(dict.fromkeys(run.method for run in mine)))
        compared[setting] = pair(members, reasons, first, setting, values)
    return compared


def over_all(
    runs: Sequence[PlannedRun], found: Sequence[dict[str, Any]], reference: str | None = None
) -> tuple[list[dict[str, Any]], Paired] | None:
    """Return the rows averaged over the settings, and their differences.

    Returns None if there is only one setting, or if a setting has no rows.

    Args:
        runs: All planned runs.
        found: Rows of the finished runs.
        reference: The method that the others are compared with.
    """
    blocks = [members for _, members in settings(runs, found)]
    if not 1 < len(settings_of(runs)) == len(blocks):
        return None
    members = over_settings(blocks, runs[0].setting)
    reasons = {method: ", ".join(places) for method, places in _left_out(runs, "{run.place}").items()}
    first = reference or default_reference(list(dict.fromkeys(run.method for run in runs)))
    return members, pair(members, reasons, first, f"mean over the {len(blocks)} settings")


def _left_out(runs: Sequence[PlannedRun], place: str) -> dict[str, list[str]]:
    """Return method -> its runs that cannot be compared, each with the reason."""
    found: dict[str, list[str]] = {}
    for run in runs:
        summary = run.summary
        if summary is None or summary.get("diverged"):
            reason = "diverged" if summary else "is not finished"
            found.setdefault(run.method, []).append(f"{place.format(run=run)} {reason}")
    return found


def write_tuning(folder: Path, tuning: Tuning) -> None:
    """Write tuning.csv."""
    write_atomically(folder / "tuning.csv", as_csv(tuning_records(tuning)).encode())


def write_results(
    folder: Path,
    runs: Sequence[PlannedRun],
    reference: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    tuning: Tuning | None = None,
    budget: Budget = "rounds",
) -> str:
    """Write results.csv, results.md, results.tex, results.pdf, results.png, and the summaries of all runs in one file.

    If methods share seeds, results.md and results.tex also have their paired differences; these are in
    results_paired.csv too, and drawn in results_paired.pdf and .png. Mean ranks over several settings are drawn in
    results_ranks.pdf and .png. Such files from an earlier call are removed if they do not apply to these runs.

    Args:
        folder: Folder of the comparison.
        runs: All planned runs.
        reference: The method that the others are compared with, see :func:`~fedamm_pl.results.pairs.default_reference`.
        groups: Title -> methods, as tables and figures show them.
        tuning: How the options of methods were chosen, if any were.
        budget: What all methods may spend. With bytes, the files are called results_bytes, and accuracy against bytes
            is drawn in results_bytes_curves.pdf and .png.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: If the runs cannot be compared at the same bytes.
        OSError: If a table cannot be written. A figure that cannot be drawn or written causes only a warning.
    """
    found, stem = rows(runs, groups, budget), "results_bytes" if budget == "bytes" else "results"
    write_atomically(folder / f"{stem}.csv", as_csv(found).encode())
    all_runs = [*runs, *(trial.run for trial in (tuning.trials if tuning else ()))]
    summaries = {run.folder.relative_to(folder).as_posix(): run.summary for run in all_runs if run.finished}
    write_atomically(folder / "summaries.json", json.dumps(summaries).encode())
    if not tuning:
        (folder / "tuning.csv").unlink(missing_ok=True)
    compared = pairs(runs, found, reference)
    ranks = rank_within(list(compared.values()), groups)
    blocks = [(members, compared[setting]) for setting, members in settings(runs, found)]
    if overall := over_all(runs, found, reference):
        blocks.append(overall)
    shown = {paired.setting: paired for _, paired in blocks if paired.differences}
    markdown, latex = _tables(blocks, ranks, groups)
    notes = [note for note, applies in ((BOLD, found), (LEGEND, shown)) if applies]
    notes += ["† uses the server's balanced meta set."] if any(row["uses_meta_set"] for row in found) else []
    notes += group_notes(compared, groups or {}, ranks) if found else []
    notes += budget_notes(runs, found) if budget == "bytes" else []
    markdown += [line for note in notes for line in (markdown_text(note), "")]
    if tuning:
        cells, notes = tuning_cells(tuning), [tuning_legend(tuning), *tuning_notes(tuning)]
        markdown += [*as_markdown(cells), "", *(line for note in notes for line in (markdown_text(note), ""))]
        latex += ["% Tuning on validation", *as_latex(cells), ""]
    write_atomically(folder / f"{stem}.md", "\n".join(markdown).encode())
    write_atomically(folder / f"{stem}.tex", "\n".join(latex).encode())
    if shown:
        write_atomically(folder / f"{stem}_paired.csv", as_csv(paired_records(shown.values())).encode())
    else:
        (folder / f"{stem}_paired.csv").unlink(missing_ok=True)
    panels = {paired.setting: accuracies(members) for members, paired in blocks}
    panels_of_pairs = {setting: paired.forest for setting, paired in shown.items()}
    references = {setting: paired.reference for setting, paired in shown.items()}
    _draw(folder / stem, (lambda: comparison(panels, groups)) if found else None)
    _draw(folder / f"{stem}_paired", (lambda: forest(panels_of_pairs, references, groups)) if shown else None)
    _draw(folder / f"{stem}_ranks", (lambda: rank_diagram(ranks)) if ranks else None)
    if budget == "bytes":
        curves = byte_curves(finished(runs))
        _draw(folder / f"{stem}_curves", (lambda: accuracy_against_bytes(curves)) if curves else None)
    return "\n".join(markdown)


def _tables(
    blocks: Sequence[tuple[list[dict[str, Any]], Paired]],
    ranks: Mapping[str, Ranks],
    groups: Mapping[str, Sequence[str]] | None,
) -> tuple[list[str], list[str]]:
    """Return the tables of each setting and the mean ranks, as lines of Markdown and of LaTeX."""
    markdown: list[str] = []
    latex: list[str] = []
    for members, paired in blocks:
        cells, setting = table(members, groups), paired.setting
        markdown += [*([f"**{markdown_text(setting)}**", ""] if setting else []), *as_markdown(cells), ""]
        latex += [f"% {latex_text(setting)}", *as_latex(cells), ""]
        if paired.differences:
            differences = difference_cells(paired, groups)
            markdown += [markdown_text(shared_seeds(paired)), "", *as_markdown(differences), ""]
            latex += [f"% {latex_text(shared_seeds(paired))}", *as_latex(differences), ""]
        for note in paired.notes:
            markdown += [markdown_text(note), ""]
    if ranks:
        markdown += [markdown_text(rank_legend(ranks)), "", *as_markdown(rank_cells(ranks)), ""]
        latex += ["% Mean ranks", *as_latex(rank_cells(ranks)), ""]
    return markdown, latex


def _draw(path: Path, draw: Callable[[], Figure] | None) -> None:
    """Write a figure as PDF and PNG, or remove an earlier one if there is nothing to draw."""
    files = {kind: path.with_name(f"{path.name}.{kind}") for kind in ("pdf", "png")}
    if draw is None:
        for file in files.values():
            file.unlink(missing_ok=True)
        return
    try:
        figure = draw()
        write_atomically(files["pdf"], rendered(figure, "pdf"))
        write_atomically(files["png"], rendered(figure, "png", dpi=150))
    except Exception as error:
        log.warning("%s: the figure is left out (%s: %s)", path.parent, type(error).__name__, error)
