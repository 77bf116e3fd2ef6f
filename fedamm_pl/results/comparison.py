"""Methods x seeds x settings on shared splits: planned, run side by side, and the table that a paper would print."""

import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedamm_pl.federation.fingerprint import differences
from fedamm_pl.files import NO_FOLLOW, refuse_links, write_atomically
from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.figures import comparison
from fedamm_pl.results.runs import read, read_summary
from fedamm_pl.results.tables import accuracies, as_latex, as_markdown, row, table


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how it is run."""

    base: dict[str, Any]
    """Options that all runs share, as in the configuration of a run."""
    methods: dict[str, dict[str, Any] | None]
    """Name in the table -> options of the algorithm; class_path may be left out where it is the name."""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    """Each is used by all methods: same split, same clients, same initial weights."""
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Option like data.partition -> its values; every combination is a setting with a table of its own."""
    dir: str | None = None
    """Folder of the comparison; by default runs/<config name>. What is finished in it is skipped, what was interrupted continues."""
    jobs: int = 1
    """Runs side by side; they share the processor's cores."""

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds or not all(self.grid.values()):
            raise ValueError(
                "Expected `methods`, `seeds` and each entry of `grid` to hold something, got one that is empty."
            )
        if self.jobs < 1:
            raise ValueError(f"Expected `jobs` to be 1 or more, got {self.jobs}.")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One cell of the comparison.

    Attributes:
        method: Its name in the table.
        seed: Its seed.
        setting: Option of the grid -> value.
        folder: Where it runs.
        config: Its whole configuration as YAML.
        num_rounds: Its rounds.
    """

    method: str
    seed: int
    setting: dict[str, Any]
    folder: Path
    config: str
    num_rounds: int

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What it amounts to; None unless it has gone through all its rounds, or a callback ended it for a good reason."""
        summary = read_summary(self.folder)
        if summary is None or summary["stopped"]:
            return None
        return summary if summary["num_rounds"] == self.num_rounds or summary["ended"] else None

    @property
    def finished(self) -> bool:
        """Whether it has run to its end."""
        return self.summary is not None

    def __str__(self) -> str:
        return ", ".join(
            [self.method, *(f"{name} {value}" for name, value in self.setting.items()), f"seed {self.seed}"]
        )


def plan(config: CompareConfig, folder: Path, resolve: Callable[[dict[str, Any]], tuple[str, int]]) -> list[PlannedRun]:
    """List the runs of a comparison.

    Args:
        config: What is compared.
        folder: Where.
        resolve: The options of a run -> its whole configuration as YAML, and its number of rounds.

    Raises:
        ValueError: If a run's options are wrong, or two runs would share a folder.
    """
    runs = []
    for values in itertools.product(*config.grid.values()):
        setting = dict(zip(config.grid, values, strict=True))
        for (method, options), seed in itertools.product(config.methods.items(), config.seeds):
            whole = merged(config.base, {"seed": seed})
            for name, value in setting.items():
                whole = merged(whole, nested(name, value))
            options = dict(options or {})
            shared = whole.pop("algorithm", None) or {}
            arguments = {**shared.get("init_args", shared), **options.pop("init_args", {})}
            class_path = options.pop("class_path", method)
            whole["algorithm"] = {"class_path": class_path, "init_args": {**arguments, **options}}
            try:
                text, num_rounds = resolve(whole)
            except ValueError as error:
                raise ValueError(f"{method}: {error}") from error
            parts = [*(f"{name.rpartition('.')[2]}_{value}" for name, value in setting.items()), method, f"seed_{seed}"]
            runs.append(PlannedRun(method, seed, setting, folder.joinpath(*map(file_name, parts)), text, num_rounds))
    folders = [run.folder for run in runs]
    if twice := [run for run in runs if folders.count(run.folder) > 1]:
        raise ValueError(
            f"Expected methods, seeds and values of the grid to give each run a folder of its own, got two in {twice[0].folder}."
        )
    return runs


def merged(options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options with some replaced.

    Example:
        >>> merged({"data": {"a": 1, "b": 2}}, {"data": {"b": 3}})
        {'data': {'a': 1, 'b': 3}}
    """
    whole = copy.deepcopy(dict(options))
    for name, value in more.items():
        nest = isinstance(value, Mapping) and isinstance(whole.get(name), dict)
        whole[name] = merged(whole[name], value) if nest else value
    return whole


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return ``a.b`` and a value as nested options.

    Example:
        >>> nested("data.partition", "iid")
        {'data': {'partition': 'iid'}}
    """
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


def file_name(text: str) -> str:
    """Return a text as the name of a folder.

    Example:
        >>> file_name("FedLC, tau 0.5")
        'FedLC_tau_0.5'
    """
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.") or "unnamed"


def check_folders(runs: Sequence[PlannedRun], flat: Callable[[str], Mapping[str, Any]]) -> None:
    """Check that what the folders hold already are these runs, and that nothing leads out of them.

    Args:
        runs: The runs.
        flat: A configuration as YAML -> option -> value.

    Raises:
        ValueError: If a folder holds a run with other options, which the message lists, or a link; or if a file cannot be read.
    """
    for run in runs:
        for folder in reversed(run.folder.parents[: len(run.setting) + 2]):  # from that of the comparison downwards
            refuse_links(folder)
        config = read(run.folder / "config.yaml", lambda text, _: flat(text))
        if config is not None and (differing := differences(config, flat(run.config))):
            raise ValueError(
                f"Expected {run.folder} to hold the run {run}, got one with other options: {'; '.join(differing)}. "
                "Choose another `dir`, or the old options."
            )


def execute(runs: Sequence[PlannedRun], jobs: int) -> list[PlannedRun]:
    """Run what is not finished, some side by side, each in a process of its own; stop all of them if this one is stopped.

    Args:
        runs: The runs.
        jobs: How many at a time.

    Returns:
        The runs that failed; their output is in ``<folder>.log``.
    """
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    running: dict[subprocess.Popen[bytes], tuple[PlannedRun, float]] = {}
    failed, done = [], len(runs) - len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[start(run, jobs)] = run, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                run, began = running.pop(process)
                done += 1
                if process.returncode or not run.finished:
                    failed.append(run)
                    print(f"[{done}/{len(runs)}] {run}: failed, see {run.log}", flush=True)
                    continue
                mean = (run.summary or {})["mean_last_10"]["test/acc"]
                seconds = time.monotonic() - began
                print(f"[{done}/{len(runs)}] {run}: {100 * mean:.1f} (mean of last 10), {seconds:.0f} s", flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def start(run: PlannedRun, jobs: int) -> "subprocess.Popen[bytes]":
    """Start a run in a process of its own."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    path = run.folder.with_name(run.folder.name + ".yaml")
    write_atomically(path, run.config.encode())
    package = str(Path(__file__).parents[2])
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fedamm_pl.cli.main", "--config", str(path), "--output.dir", str(run.folder)]
    with open(os.open(run.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


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
    """
    found = rows(runs)
    columns = dict.fromkeys(name for row in found for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    summaries = {run.folder.relative_to(folder).as_posix(): run.summary for run in runs if run.finished}
    write_atomically(folder / "summaries.json", json.dumps(summaries).encode())
    markdown, latex, panels = [], [], {}
    for setting, members in settings(runs, found):
        cells = table(members)
        markdown += [f"**{setting}**", "", *as_markdown(cells), ""] if setting else [*as_markdown(cells), ""]
        latex += [f"% {setting}", *as_latex(cells), ""]
        panels[setting] = accuracies(members)
    if any(row["uses_meta_set"] for row in found):
        markdown += ["† uses the server's balanced meta set.", ""]
    write_atomically(folder / "results.md", "\n".join(markdown).encode())
    write_atomically(folder / "results.tex", "\n".join(latex).encode())
    if found:
        figure = comparison(panels)
        write_atomically(folder / "results.pdf", rendered(figure, "pdf"))
        write_atomically(folder / "results.png", rendered(figure, "png", dpi=150))
    return "\n".join(markdown)
