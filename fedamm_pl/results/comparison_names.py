"""What a comparison calls the methods of its runs, which know only the class: read from its results.csv."""

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
"""Letters of a name: a page has no room for more."""
MAX_SETTINGS = 6
"""Folders between that of a comparison and those of its methods."""


def comparison_names(runs: Sequence[Run]) -> list[str | None]:
    """Return for each run the name of its method in the comparison in whose folder it lies; None if nothing tells.

    The folder of a run is made of its setting, its method and its seed. A row of results.csv has all three, so that a name is taken
    only if the whole path agrees; seeds that are not finished share the folder of their method with those that are.
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
    """Return the folders of the methods of a comparison -> their names; empty if the folder is that of no comparison."""
    with suppress(ValueError, OSError):  # a file of something else, or none that may be read
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
        parts = [*(f"{columns[i].rpartition('.')[2]}_{row[i]}" for i in settings), row[place]]
        found[folder.joinpath(*map(file_name, parts))] = row[place]
    return found
