"""The files of a comparison: tables first, whatever becomes of the figure."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedamm_pl.files import write_atomically
from fedamm_pl.results.comparison import PlannedRun
from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.figures import comparison
from fedamm_pl.results.tables import accuracies, as_latex, as_markdown, latex_text, markdown_text, row, table
from fedamm_pl.terminal import as_csv

log = logging.getLogger(__name__)


def rows(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Return the rows of the finished runs."""
    return [row(run.method, run.seed, run.setting, summary) for run in runs if (summary := run.summary)]


def settings(runs: Sequence[PlannedRun], found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each setting, as text, with its rows."""
    distinct: list[dict[str, Any]] = []
    for run in runs:
        if run.setting not in distinct:
            distinct.append(run.setting)
    for setting in distinct:
        members = [row for row in found if all(row[name] == value for name, value in setting.items())]
        if members:
            yield ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in setting.items()), members


def write_results(folder: Path, runs: Sequence[PlannedRun]) -> str:
    """Write results.csv, results.md, results.tex, results.pdf, results.png, and all the runs' summaries in one file.

    Returns:
        The table as Markdown.

    Raises:
        OSError: If a table cannot be written. A figure that cannot be drawn or written is a warning.
    """
    found = rows(runs)
    columns = dict.fromkeys(name for row in found for name in row)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(as_csv, columns))
    writer.writerows([as_csv(row.get(name, "")) for name in columns] for row in found)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    summaries = {run.folder.relative_to(folder).as_posix(): run.summary for run in runs if run.finished}
    write_atomically(folder / "summaries.json", json.dumps(summaries).encode())
    markdown, latex, panels = [], [], {}
    for setting, members in settings(runs, found):
        cells = table(members)
        markdown += (
            [f"**{markdown_text(setting)}**", "", *as_markdown(cells), ""] if setting else [*as_markdown(cells), ""]
        )
        latex += [f"% {latex_text(setting)}", *as_latex(cells), ""]
        panels[setting] = accuracies(members)
    if any(row["uses_meta_set"] for row in found):
        markdown += ["† uses the server's balanced meta set.", ""]
    write_atomically(folder / "results.md", "\n".join(markdown).encode())
    write_atomically(folder / "results.tex", "\n".join(latex).encode())
    if found:
        try:
            figure = comparison(panels)
            write_atomically(folder / "results.pdf", rendered(figure, "pdf"))
            write_atomically(folder / "results.png", rendered(figure, "png", dpi=150))
        except Exception as error:
            log.warning("%s: the figure is left out (%s: %s)", folder, type(error).__name__, error)
    return "\n".join(markdown)
