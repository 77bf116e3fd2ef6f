"""``fedamm compare``: methods x seeds x settings on shared splits, and the table that a paper would print."""

import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fedamm_pl
from fedamm_pl.federation.fingerprint import differences
from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.files import write_atomically
from fedamm_pl.results.figures import comparison

KINDS = {"final": "final", "best": "best on test", "mean_last_10": "mean of last 10"}
LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
    }
)
COSTS = {"bytes_per_round": "MB a round", "seconds_per_round": "s a round"}


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
class Run:
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
    def finished(self) -> bool:
        """Whether it has run to its end."""
        summary = self.summary
        return summary is not None and summary["num_rounds"] == self.num_rounds and not summary["stopped"]

    @property
    def summary(self) -> dict[str, Any] | None:
        """What it amounts to, or None if it is not finished."""
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def __str__(self) -> str:
        return ", ".join(
            [self.method, *(f"{name} {value}" for name, value in self.setting.items()), f"seed {self.seed}"]
        )


def plan(config: CompareConfig, folder: Path, resolve: Callable[[dict[str, Any]], tuple[str, int]]) -> list[Run]:
    """List the runs of a comparison.

    Args:
        config: What is compared.
        folder: Where.
        resolve: The options of a run -> its whole configuration as YAML, and its number of rounds.

    Raises:
        ValueError: If a run's options are wrong, or its folder holds a run with others.
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
            runs.append(Run(method, seed, setting, folder.joinpath(*map(file_name, parts)), text, num_rounds))
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


def execute(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Run what is not finished, some side by side, each in a process of its own; stop all of them if this one is stopped.

    Args:
        runs: The runs.
        jobs: How many at a time.

    Returns:
        The runs that failed; their output is in ``<folder>.log``.
    """
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
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
                    print(f"[{done}/{len(runs)}] {run}: failed, see {run.folder}.log", flush=True)
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


def start(run: Run, jobs: int) -> "subprocess.Popen[bytes]":
    """Start a run in a process of its own."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    path = run.folder.with_name(run.folder.name + ".yaml")
    write_atomically(path, run.config.encode())
    package = str(Path(fedamm_pl.__file__).parent.parent)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fedamm_pl.cli.main", "--config", str(path), "--output.dir", str(run.folder)]
    with run.folder.with_name(run.folder.name + ".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


# Results


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each finished run: setting, method, seed, accuracies in percent, bytes and seconds a round."""
    found = []
    for run in runs:
        summary = run.summary
        if summary is None or not run.finished:
            continue
        row = {**run.setting, "method": run.method, "seed": run.seed, "uses_meta_set": summary["uses_meta_set"]}
        for kind in KINDS:
            for metric, name in SHOWN.items():
                if metric in summary[kind]:
                    value = summary[kind][metric]
                    row[f"{kind}/{name}"] = 100 * (value["value"] if isinstance(value, dict) else value)
        row["bytes_per_round"] = summary["bytes_per_round"]["received"] + summary["bytes_per_round"]["sent"]
        row["seconds_per_round"] = sum(summary["seconds_per_round"].values())
        for name in ("failed_clients", "refused_updates", "failed_rounds", "resumes"):
            row[name] = summary[name]
        found.append(row)
    return found


def write_results(folder: Path, runs: Sequence[Run]) -> str:
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
    markdown, latex = [], []
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for setting, members in settings(runs, found):
        cells = table(members)
        markdown += [f"**{setting}**", "", *as_markdown(cells), ""] if setting else [*as_markdown(cells), ""]
        latex += [f"% {setting}", *as_latex(cells), ""]
        panels[setting] = {
            name: {method: [row[f"mean_last_10/{name}"] for row in mine] for method, mine in by_method(members)}
            for name in SHOWN.values()
            if all(f"mean_last_10/{name}" in row for row in members)
        }
    if any(row["uses_meta_set"] for row in found):
        markdown += ["† uses the server's balanced meta set.", ""]
    write_atomically(folder / "results.md", "\n".join(markdown).encode())
    write_atomically(folder / "results.tex", "\n".join(latex).encode())
    if found:
        figure = comparison(panels)
        figure.savefig(folder / "results.pdf")
        figure.savefig(folder / "results.png", dpi=150)
    return "\n".join(markdown)


def settings(runs: Sequence[Run], found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each setting, as text, with its rows."""
    distinct: list[dict[str, Any]] = []
    for run in runs:
        if run.setting not in distinct:
            distinct.append(run.setting)
    for setting in distinct:
        members = [row for row in found if all(row[name] == value for name, value in setting.items())]
        if members:
            yield ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in setting.items()), members


def by_method(members: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of each method, in order."""
    names = dict.fromkeys(row["method"] for row in members)
    return [(name, [row for row in members if row["method"] == name]) for name in names]


def table(members: Sequence[dict[str, Any]]) -> list[list[tuple[str, bool]]]:
    """Return the cells of a table, with whether each is bold; the first line are the headings.

    Accuracies are mean ± standard deviation over the seeds. The best of a column is bold where it is ahead of the second by
    more than either one's standard deviation.
    """
    names = [name for name in SHOWN.values() if all(f"final/{name}" in row for row in members)]
    columns = {f"{kind}/{name}": f"{name}, {title}" for kind, title in KINDS.items() for name in names}
    groups = by_method(members)
    lines = [[(title, False) for title in ("method", "seeds", *columns.values(), *COSTS.values())]]
    best = {column: leader([[row[column] for row in mine] for _, mine in groups]) for column in columns}
    for index, (method, mine) in enumerate(groups):
        line = [(method + (" †" if mine[0]["uses_meta_set"] else ""), False), (str(len(mine)), False)]
        for column in columns:
            values = [row[column] for row in mine]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            line.append((f"{statistics.mean(values):.1f}{spread}", best[column] == index))
        line.append((f"{statistics.mean(row['bytes_per_round'] for row in mine) / 1e6:.2f}", False))
        line.append((f"{statistics.mean(row['seconds_per_round'] for row in mine):.2f}", False))
        lines.append(line)
    return lines


def leader(groups: Sequence[Sequence[float]]) -> int | None:
    """Return which group's mean is ahead of the second by more than either one's standard deviation, or None.

    Example:
        >>> leader([[60.0, 62.0], [70.0, 71.0]]), leader([[60.0, 62.0], [61.0, 63.0]]), leader([[60.0], [70.0]])
        (1, None, None)
    """
    if len(groups) < 2 or min(len(group) for group in groups) < 2:
        return None  # no spread is known
    order = sorted(range(len(groups)), key=lambda index: statistics.mean(groups[index]), reverse=True)
    first, second = groups[order[0]], groups[order[1]]
    ahead = statistics.mean(first) - statistics.mean(second)
    return order[0] if ahead > max(statistics.stdev(first), statistics.stdev(second)) else None


def as_markdown(cells: Sequence[Sequence[tuple[str, bool]]]) -> list[str]:
    """Format a table as Markdown."""
    escaped = [[(text.replace("|", "\\|"), bold) for text, bold in line] for line in cells]
    lines = ["| " + " | ".join(f"**{text}**" if bold else text for text, bold in line) + " |" for line in escaped]
    return [lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]


def as_latex(cells: Sequence[Sequence[tuple[str, bool]]]) -> list[str]:
    """Format a table as LaTeX, for the package booktabs."""
    lines = [
        " & ".join(rf"\textbf{{{t.translate(LATEX)}}}" if bold else t.translate(LATEX) for t, bold in line)
        for line in cells
    ]
    body = [line + r" \\" for line in lines]
    columns = "l" + "r" * (len(cells[0]) - 1)
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]


def check_folders(runs: Sequence[Run], flat: Callable[[str], Mapping[str, Any]]) -> None:
    """Check that what the folders hold already are these runs.

    Args:
        runs: The runs.
        flat: A configuration as YAML -> option -> value.

    Raises:
        ValueError: If a folder holds a run with other options; the message lists them.
    """
    for run in runs:
        path = run.folder / "config.yaml"
        if path.is_file() and (differing := differences(flat(path.read_text()), flat(run.config))):
            raise ValueError(
                f"Expected {run.folder} to hold the run {run}, got one with other options: {'; '.join(differing)}. "
                "Choose another `dir`, or the old options."
            )
