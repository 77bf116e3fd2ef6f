"""The runs of a comparison: every combination of method, seed and setting, each in its own folder."""

import collections
import copy
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedamm_pl.federation.fingerprint import differences, flatten
from fedamm_pl.files import refuse_links
from fedamm_pl.results.comparison_config import CompareConfig
from fedamm_pl.results.reading import read_config, read_summary
from fedamm_pl.results.tables import in_groups

MAX_NAME = 100
"""Largest length of a folder's name in bytes; file systems allow 255, and file endings need some of them."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        method: Name of the method in the table.
        seed: Seed of the run.
        setting: Option of the grid -> value.
        folder: Folder of the run.
        config: Complete configuration of the run as YAML.
        num_rounds: Number of rounds.
    """

    method: str
    seed: int
    setting: dict[str, Any]
    folder: Path
    config: str
    num_rounds: int

    @property
    def log(self) -> Path:
        """File that receives the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def summary(self) -> dict[str, Any] | None:
        """Content of summary.json; None unless the run completed all rounds or was ended early without a fault."""
        summary = read_summary(self.folder)
        if summary is None or summary["stopped"]:
            return None
        return summary if summary["num_rounds"] == self.num_rounds or summary["ended"] else None

    @property
    def finished(self) -> bool:
        """Whether the run is complete; see :attr:`summary`."""
        return self.summary is not None

    @property
    def place(self) -> str:
        """The setting and the seed as text."""
        return ", ".join([*(f"{name} {value}" for name, value in self.setting.items()), f"seed {self.seed}"])

    def __str__(self) -> str:
        return f"{self.method}, {self.place}"


def plan(config: CompareConfig, folder: Path, resolve: Callable[[dict[str, Any]], tuple[str, int]]) -> list[PlannedRun]:
    """List the runs of a comparison.

    Args:
        config: The comparison.
        folder: Folder of the comparison.
        resolve: Options of a run -> its complete configuration as YAML, and its number of rounds.

    Raises:
        ValueError: If a run's options are wrong, or two runs would share a folder.
    """
    runs = []
    methods = [name for _, members in in_groups(config.methods, config.groups) for name in members]
    for values in itertools.product(*config.grid.values()):
        setting = dict(zip(config.grid, values, strict=True))
        for method, seed in itertools.product(methods, config.seeds):
            whole = merged(config.base, {"seed": seed})
            for name, value in setting.items():
                group, _, option = name.partition(".")
                if (
                    option
                    and "init_args" in (whole.get(group) or {})
                    and not option.startswith(("init_args", "class_path"))
                ):
                    name = f"{group}.init_args.{option}"  # as the group is written in the configuration of a run
                whole = merged(whole, nested(name, value))
            try:
                shared = whole.pop("algorithm", None) or {}
                arguments, own = flat(shared), flat(config.methods[method] or {})
                if (
                    "init_args" in shared
                ):  # copied from the configuration of a run, whose class is not that of all methods
                    arguments.pop("class_path", None)
                class_path = own.pop("class_path", method)
                whole["algorithm"] = {"class_path": class_path, "init_args": {**arguments, **own}}
                text, num_rounds = resolve(whole)
            except ValueError as error:
                raise ValueError(f"{method}: {error}") from error
            parts = [*(f"{name.rpartition('.')[2]}_{value}" for name, value in setting.items()), method, f"seed_{seed}"]
            runs.append(PlannedRun(method, seed, setting, folder.joinpath(*map(file_name, parts)), text, num_rounds))
    require_own_folders(runs)
    return runs


def require_own_folders(runs: Sequence[PlannedRun]) -> None:
    """Check that no two runs share a folder.

    Raises:
        ValueError: If two runs share a folder; the message names it.
    """
    counts = collections.Counter(run.folder for run in runs)
    if twice := [folder for folder, count in counts.items() if count > 1]:
        raise ValueError(
            f"Expected methods, seeds and values of the grid to give each run a folder of its own, got two in {twice[0]}."
        )


def require_different_runs(runs: Sequence[PlannedRun]) -> None:
    """Check that each setting and seed gives a method another run.

    Raises:
        ValueError: If two runs of a method have the same options; the message names them.
    """
    first: dict[tuple[str, str], PlannedRun] = {}
    for run in runs:
        if (other := first.setdefault((run.method, run.config), run)) is not run:
            raise ValueError(
                f"Expected the grid to give {run.method} other options in each setting, got the same for {other.place} and "
                f"{run.place}: a method's own options override the grid, and some options follow from others."
            )


def settings_of(runs: Iterable[PlannedRun]) -> list[dict[str, Any]]:
    """Return the distinct settings of runs, in order."""
    distinct: list[dict[str, Any]] = []
    for run in runs:
        if run.setting not in distinct:
            distinct.append(run.setting)
    return distinct


def merged(options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options with some of them replaced.

    Example:
        >>> merged({"data": {"a": 1, "b": 2}}, {"data": {"b": 3}})
        {'data': {'a': 1, 'b': 3}}
    """
    whole = copy.deepcopy(dict(options))
    for name, value in more.items():
        nest = isinstance(value, Mapping) and isinstance(whole.get(name), dict)
        whole[name] = merged(whole[name], value) if nest else value
    return whole


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an algorithm in one mapping, with those below ``init_args`` moved to the top.

    Raises:
        ValueError: If the options are not a mapping.

    Example:
        >>> flat({"class_path": "FedProx", "init_args": {"mu": 0.1}})
        {'mu': 0.1, 'class_path': 'FedProx'}
    """
    inner = options.get("init_args", {}) if isinstance(options, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ValueError(f"Expected options of an algorithm to be a mapping, got {options!r:.60}.")
    return {**inner, **{name: value for name, value in options.items() if name != "init_args"}}


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return an option with a dotted name, such as ``a.b``, as nested options.

    Example:
        >>> nested("data.partition", "iid")
        {'data': {'partition': 'iid'}}
    """
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


def file_name(text: str) -> str:
    """Turn a text into a folder name; a long text is cut and gets its hash as a suffix, so that names stay distinct.

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
    """Check that the folders hold nothing but these runs, and no links that lead out of them.

    Args:
        runs: The runs.

    Raises:
        ValueError: If a folder holds a run with other options, which the message lists, a link or a pipe, or if a file
            cannot be read.
    """
    for run in runs:
        for folder in reversed(run.folder.parents[: len(run.setting) + 2]):  # from the comparison's folder downwards
            refuse_links(folder)
        if run.log.exists() and not run.log.is_file():  # opening a pipe would block
            raise ValueError(
                f"Expected {run.log} to be a file, into which the output of the run goes, got something else."
            )
        config = read_config(run.folder)
        wanted = yaml.safe_load(run.config)
        differing = [] if config is None else differences(flatten(config), flatten(wanted))
        differing += [] if config is None else differences(_own_classes(config), _own_classes(wanted))
        if differing:
            raise ValueError(
                f"Expected {run.folder} to hold the run {run}, got one with other options: {'; '.join(differing)}. "
                "Choose another `dir`, or the old options."
            )


def _own_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return group -> import path of the classes that are not the package's: :func:`flatten` has their bare names only."""
    paths = {
        group: str(options.get("class_path", "")) for group, options in config.items() if isinstance(options, dict)
    }
    return {group: path for group, path in paths.items() if path and not path.startswith("fedamm_pl.")}
