"""Runs as loaded from their folders."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedamm_pl.federation.summary import num_averaged, summarize
from fedamm_pl.results.content import check_together
from fedamm_pl.results.reading import (
    MAX_BYTES,
    METRICS,
    TUNING,
    read_config,
    read_diagnostics,
    read_history,
    read_summary,
)
from fedamm_pl.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

log = logging.getLogger(__name__)

MAX_RUNS, MAX_SIZE = 2_000, 10**9
"""Largest number of runs below one folder, and largest total size in bytes of the files that are read."""


@dataclass(frozen=True)
class Run:
    """A run loaded from its folder; see :func:`load`.

    Attributes:
        path: Folder of the run.
        config: Configuration, nested as in config.yaml; empty if the run was made from Python.
        history: A row for each evaluated round, the first of round 0; metrics that were not measured are left out.
        summary: Content of summary.json, or None while the run is unfinished.
        diagnostics: Content of diagnostics.json, or None if there is none.
    """

    path: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    summary: dict[str, Any] | None
    diagnostics: dict[str, Any] | None

    @cached_property
    def metrics(self) -> "DataFrame":
        """Content of metrics.csv: a row for each evaluated round, a column for each metric, NaN if not measured."""
        from pandas import DataFrame  # takes a third of a second to import

        return DataFrame(self.history, dtype=float)

    @property
    def method(self) -> str:
        """Name of the algorithm's class, or of the folder if the class is unknown."""
        if self.summary is not None:
            return str(self.summary["method"])
        return str(self._option("algorithm", "class_path") or self.path.resolve().name).rpartition(".")[2]

    @property
    def dataset(self) -> str:
        """Name of the data set; empty if unknown."""
        return str((self.summary or {}).get("dataset") or self._option("data", "init_args", "dataset") or "")

    @property
    def seed(self) -> int | None:
        """Seed of the run; None if unknown."""
        return (self.summary or self.config).get("seed")

    @property
    def name(self) -> str:
        """Method, data set and seed in one line."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, [self.method, self.dataset, seed]))

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """``final``, ``best`` and ``mean_last_10`` of each test metric; for an unfinished run, of the rounds so far."""
        return self.summary or summarize(self.history)

    @property
    def num_averaged(self) -> int:
        """Number of evaluated rounds over which ``mean_last_10`` is the mean."""
        return int((self.summary or {}).get("num_averaged", num_averaged(self.history)))

    def figures(self) -> "dict[str, Figure]":
        """Return name -> figure for each figure that applies to the run."""
        from fedamm_pl.results.run_figures import run_figures  # imports matplotlib

        return run_figures(self.history, self.diagnostics)

    def _option(self, *names: str) -> Any:
        """Return an option of the configuration, or None if it is missing."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def load(path: str | Path) -> Run:
    """Load a run from its folder, whether it is finished or not.

    Args:
        path: Folder of the run.

    Raises:
        ValueError: If there is no run, or one of its files cannot be read; the message names the file.

    Example:
        .. code-block:: python

            run = load("runs/quickstart/2026-01-31_12-00-00-000000")
            print(run.metrics[["round", "test/acc_few"]])
    """
    folder = Path(os.path.expanduser(path))
    # a running run writes metrics.csv first; with the other files read before it, they are never newer than its rows
    summary, diagnostics = read_summary(folder), read_diagnostics(folder)
    history = read_history(folder)
    if history is None:
        found = "a folder without it" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise ValueError(f"Expected `path` to be the folder of a run, with {METRICS}, got {path} ({found}).")
    if summary is not None and history and summary["num_rounds"] < history[-1]["round"]:
        summary = None  # it dates from before the run was continued for more rounds
    try:
        check_together(summary, diagnostics)
    except ValueError as error:
        raise ValueError(f"{error} ({folder})") from None
    return Run(
        path=folder,
        config=read_config(folder) or {},
        history=history,
        summary=summary,
        diagnostics=diagnostics,
    )


def load_all(paths: Iterable[str | Path]) -> list[Run]:
    """Load several runs; a run that is found twice is loaded once.

    Args:
        paths: Folders of runs, and folders with runs at any depth below them, such as that of a comparison.

    Raises:
        ValueError: If one of the folders has no run or too many, or a file cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        whole = Path(os.path.expanduser(path))
        for folder in list(_below(whole)) or [whole]:
            if (place := folder.resolve()) not in runs:
                runs[place] = load(folder)
    return list(runs.values())


def _below(path: Path) -> Iterator[Path]:
    """Yield the folders of runs at or below a path, without following links.

    Folders inside the folder of a run are not searched, since loggers write files called metrics.csv there too.
    """
    waiting, found, size = [path], 0, 0
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError:  # not a folder, or not readable
            continue
        if METRICS in inside:
            found += 1
            with suppress(OSError):  # removed in the meantime
                size += sum((folder / name).lstat().st_size for name in MAX_BYTES if name in inside)
            if found > MAX_RUNS or size > MAX_SIZE:
                raise ValueError(
                    f"Expected `path` to hold at most {MAX_RUNS:,} runs with files of {MAX_SIZE:,} bytes, got {path} with more."
                )
            yield folder
        else:
            tried = {TUNING} if {TUNING, "results.csv"} <= inside.keys() else set()
            if tried:
                log.info(
                    "the runs for tuning in %s are left out; give this folder to see them",
                    printable(str(folder / TUNING)),
                )
            waiting += [folder / name for name in sorted(inside.keys() - tried, reverse=True) if inside[name]]
