"""Reading back what a run has left in its folder."""

import csv
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fedamm_pl.federation.summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.csv"
NEEDED = {
    "summary.json": "final best mean_last_10 num_rounds method dataset seed imbalance_factor IF uses_meta_set bytes_per_round "
    "seconds_per_round client_seconds_per_round stopped ended failed_clients refused_updates failed_rounds resumes",
    "diagnostics.json": "class_names class_counts shot_groups rounds",
}
NEEDED_OF_A_ROUND = "round bytes seconds client_seconds"


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it; see :func:`load`.

    Attributes:
        path: Its folder.
        config: Its configuration, nested as in config.yaml; empty if it was made from Python.
        history: A row for each evaluated round, the first of round 0; what was not measured is left out.
        metrics: Column of metrics.csv -> a value for each evaluated round, NaN where there is none.
            ``pandas.DataFrame(run.metrics)`` makes a table of it.
        summary: The content of summary.json, or None while the run is unfinished.
        diagnostics: The content of diagnostics.json, or None if there is none.
    """

    path: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    metrics: dict[str, NDArray[np.float64]]
    summary: dict[str, Any] | None
    diagnostics: dict[str, Any] | None

    @property
    def method(self) -> str:
        """Name of the algorithm's class; of the folder, where nothing tells."""
        if self.summary is not None:
            return str(self.summary["method"])
        return str(self._option("algorithm", "class_path") or self.path.resolve().name).rpartition(".")[2]

    @property
    def dataset(self) -> str:
        """Name of the data set, empty where nothing tells."""
        return str((self.summary or {}).get("dataset") or self._option("data", "init_args", "dataset") or "")

    @property
    def seed(self) -> int | None:
        """Its seed, or None where nothing tells."""
        return (self.summary or self.config).get("seed")

    @property
    def name(self) -> str:
        """Method, data set and seed in one line."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, [self.method, self.dataset, seed]))

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """``final``, ``best`` and ``mean_last_10`` of each test metric, of the rounds so far if the run is unfinished."""
        return self.summary or summarize(self.history)

    def figures(self) -> "dict[str, Figure]":
        """Return the figures of the run: name -> figure, those that apply."""
        from fedamm_pl.results.run_figures import run_figures  # matplotlib, for those who draw

        return run_figures(self.history, self.diagnostics)

    def _option(self, *names: str) -> Any:
        """Return an option of the configuration, or None if it is not there."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def load(path: str | Path) -> Run:
    """Read a run back, be it finished or not.

    Args:
        path: The folder of the run.

    Raises:
        ValueError: If there is no run, or a file of it cannot be read; the message names the file.

    Example:
        .. code-block:: python

            run = load("runs/quickstart/2026-01-31_12-00-00-000000")
            print(run.metrics["round"], run.metrics["test/acc_few"])
    """
    folder = Path(path)
    history = read(folder / METRICS, _rows)
    if history is None:
        found = "a folder without it" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise ValueError(f"Expected `path` to be the folder of a run, with {METRICS}, got {path} ({found}).")
    columns = dict.fromkeys(name for row in history for name in row)
    summary = read_summary(folder)
    if summary is not None and history and summary["num_rounds"] < history[-1]["round"]:
        summary = None  # of the rounds before the run was started again for more
    return Run(
        path=folder,
        config=read(folder / "config.yaml", _config) or {},
        history=history,
        metrics={name: np.array([row.get(name, np.nan) for row in history], dtype=np.float64) for name in columns},
        summary=summary,
        diagnostics=read(folder / "diagnostics.json", _json),
    )


def load_all(paths: Iterable[str | Path]) -> list[Run]:
    """Read runs back, each once.

    Args:
        paths: Folders of runs, and folders with runs somewhere below, like that of a comparison.

    Raises:
        ValueError: If there is no run in one of them, or a file cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        for folder in _below(path) or [Path(path)]:
            runs.setdefault(folder.resolve(), load(folder))
    return list(runs.values())


def _below(path: str | Path) -> list[Path]:
    """List the folders of runs; what lies in the folder of a run is no other run, though loggers write a metrics.csv too."""
    found = []
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        if METRICS in files:
            subfolders.clear()
            found.append(Path(folder))
    return found


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read summary.json of a run; None if it is not there.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    summary: dict[str, Any] | None = read(folder / "summary.json", _json)
    return summary


def read(path: Path, parse: Callable[[str, str], Any]) -> Any:
    """Read and parse a file of a run; None if it is not there.

    The folder may come from somebody else: a link would lead out of it, and a pipe would be waited for.

    Args:
        path: The file.
        parse: Its text and its name -> its content.

    Raises:
        ValueError: If it is no regular file, or cannot be read; the message names it in one line.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is a link" if path.is_symlink() else "it is no regular file")
        return parse(path.read_text(encoding="utf-8"), path.name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # mangled YAML may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"Expected {path} to be as a run has written it, got a file that cannot be read: {reason:.200}"
        ) from error


def _rows(text: str, _: str) -> list[dict[str, float]]:
    lines = list(csv.reader(text.splitlines(), strict=True))
    names = next(iter(lines), [])
    if lines[1:] and "round" not in names:
        raise ValueError("it has no column round")
    # an empty field is a metric that the round does not have; NaN is a measured one
    return [
        {name: float(value) for name, value in zip(names, line, strict=True) if value} for line in lines[1:] if line
    ]


def _json(text: str, name: str) -> dict[str, Any]:
    content = json.loads(text)
    missing = [key for key in NEEDED[name].split() if key not in content]
    for row in content.get("rounds", ()):
        missing += [key for key in NEEDED_OF_A_ROUND.split() if key not in row]
    if missing:
        raise ValueError(f"it lacks {', '.join(dict.fromkeys(missing))}")
    return dict(content)


def _config(text: str, _: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    json.dumps(content, default=str, skipkeys=True)  # refuses a mapping that holds itself
    return content
