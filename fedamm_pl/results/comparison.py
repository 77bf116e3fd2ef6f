"""Methods x seeds x settings on shared splits: planned, run side by side, and the table that a paper would print."""

import copy
import dataclasses
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from fedamm_pl.federation.fingerprint import differences, flatten
from fedamm_pl.files import refuse_links, write_atomically
from fedamm_pl.results.launching import launch
from fedamm_pl.results.reading import read_config, read_summary
from fedamm_pl.results.tables import averaged
from fedamm_pl.terminal import printable, say

MAX_NAME = 100
"""Bytes of a folder's name; a file system takes 255, some of them for endings."""


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
    reference: str | None = None
    """The method that the others are compared with, seed by seed: one of `methods`; by default FedAvg, or the first if there is none."""

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds or not all(self.grid.values()):
            raise ValueError(
                "Expected `methods`, `seeds` and each entry of `grid` to hold something, got one that is empty."
            )
        if self.jobs < 1:
            raise ValueError(f"Expected `jobs` to be 1 or more, got {self.jobs}.")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(
                f"Expected `reference` to be one of `methods`, {', '.join(self.methods)}, got {self.reference}."
            )


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
    """Return a text as the name of a folder; a long one is cut, and stays apart from others by its hash.

    Example:
        >>> file_name("FedLC, tau 0.5"), len(file_name("a" * 300))
        ('FedLC_tau_0.5', 111)
    """
    name = re.sub(r"[^\w.+-]+", "_", text).strip("_.") or "unnamed"
    if len(name.encode()) > MAX_NAME:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
        name = f"{name.encode()[:MAX_NAME].decode(errors='ignore')}-{digest}"
    return name


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Check that what the folders hold already are these runs, and that nothing leads out of them.

    Args:
        runs: The runs.

    Raises:
        ValueError: If a folder holds a run with other options, which the message lists, a link, or a pipe; or if a file cannot be read.
    """
    for run in runs:
        for folder in reversed(run.folder.parents[: len(run.setting) + 2]):  # from that of the comparison downwards
            refuse_links(folder)
        if run.log.exists() and not run.log.is_file():  # to open a pipe would wait for ever
            raise ValueError(
                f"Expected {run.log} to be a file, into which the output of the run goes, got something else."
            )
        config = read_config(run.folder)
        wanted = flatten(yaml.safe_load(run.config))
        if config is not None and (differing := differences(flatten(config), wanted)):
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
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before")
    running: dict[BaseProcess, tuple[PlannedRun, float]] = {}
    failed, done = [], len(runs) - len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[start(run, jobs)] = run, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.exitcode is not None]:
                run, began = running.pop(process)
                done += 1
                if process.exitcode or not run.finished:
                    failed.append(run)
                    say(printable(f"[{done}/{len(runs)}] {run}: failed, see {run.log}"))
                    continue
                summary, seconds = run.summary or {}, time.monotonic() - began
                mean, last = summary["mean_last_10"]["test/acc"], averaged([summary.get("num_averaged")])
                say(printable(f"[{done}/{len(runs)}] {run}: {100 * mean:.1f} (mean of last {last}), {seconds:.0f} s"))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    return failed


def start(run: PlannedRun, jobs: int) -> BaseProcess:
    """Start a run in a process of its own."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    path = run.folder.with_name(run.folder.name + ".yaml")
    write_atomically(path, run.config.encode())
    return launch(path, run.folder, run.log, jobs)
