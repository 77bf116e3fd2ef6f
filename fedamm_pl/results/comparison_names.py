"""Names of methods in a comparison, read from its results.csv: the files of a run have only the name of the class."""

import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedamm_pl.results.comparison import file_name
from fedamm_pl.results.reading import read
from fedamm_pl.results.runs import Run

RESULTS = "results.csv"
MAX_NAME = 200
"""Largest length of a name in characters; a page has no room for more."""
MAX_SETTINGS = 6
"""Largest number of folders between that of a comparison and those of its methods."""


def comparison_names(runs: Sequence[Run]) -> list[str | None]:
    """Return the name of each run's method in the comparison that contains the run; None if it is unknown.

    The path of a run in a comparison is made of its setting, method and seed. The names are taken from the rows of
    results.csv, and a name is used only if the whole path to the method's folder agrees. The runs of a method for all
    seeds of a setting share this folder, so a name is also found for a run that is not finished.
    """
    known: dict[Path, dict[Path, str]] = {}
    found = []
    for run in runs:
        method = run.path.absolute().parent
        above = method.parents[: MAX_SETTINGS + 1]
        for folder in above:
            if folder not in known:
                known[folder] = _methods(folder)
        found.append(next((known[folder][method] for folder in above if method in known[folder]), None))
    return found


def _methods(folder: Path) -> dict[Path, str]:
    """Return folder -> name of each method of a comparison; empty if the folder does not hold a comparison."""
    with suppress(ValueError, OSError):  # not a comparison's file, or not readable
        named: dict[Path, str] | None = read(folder / RESULTS, lambda text: _named(folder, text))
        return named or {}
    return {}


def _named(folder: Path, text: str) -> dict[Path, str]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = next(rows, [])
    place = columns.index("method")
    settings = [i for i in range(place) if columns[i] != "group"]
    found = {}
    for row in rows:
        if len(row[place]) > MAX_NAME:
            continue
        # an empty cell is null, which names of folders call None
        parts = [*(f"{columns[i].rpartition('.')[2]}_{row[i] or None}" for i in settings), row[place]]
        found[folder.joinpath(*map(file_name, parts))] = row[place]
    return found
