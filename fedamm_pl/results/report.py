"""Runs as one HTML page that needs no other file and no network."""

from collections.abc import Sequence
from pathlib import Path

from fedamm_pl.files import write_atomically
from fedamm_pl.results.html import render
from fedamm_pl.results.report_one import single
from fedamm_pl.results.report_several import several
from fedamm_pl.results.runs import Run


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the report of runs to a file."""
    write_atomically(path, report(runs).encode())


def report(runs: Sequence[Run]) -> str:
    """Return runs as one HTML page.

    Args:
        runs: One run, or several that are to be compared.

    Returns:
        The page. Figures, style and the script that sorts its tables are inside; it loads nothing.

    Raises:
        ValueError: If there is no run.
    """
    if not runs:
        raise ValueError("Expected `runs` to hold a run, got none.")
    return render("one.html", **single(runs[0])) if len(runs) == 1 else render("several.html", **several(runs))
