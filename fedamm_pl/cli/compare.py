"""``fedamm compare``."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fedamm_pl.cli.cluster_jobs import on_cluster
from fedamm_pl.cli.config_files import check_config_files, check_linked, check_values_given
from fedamm_pl.cli.launching import Start, execute, start
from fedamm_pl.cli.messages import one_line
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED, parameters_of
from fedamm_pl.cli.parser import Parser, attribute_docstrings, build_parser, check_values, dump, in_one_line
from fedamm_pl.cli.shipped import expanded
from fedamm_pl.cli.signals import StopSignal
from fedamm_pl.files import lock_folder, refuse_links
from fedamm_pl.results.comparison import PlannedRun, check_folders, plan, require_different_runs
from fedamm_pl.results.comparison_config import CompareConfig, TuningConfig
from fedamm_pl.results.comparison_files import write_results, write_tuning
from fedamm_pl.results.tuning import METRIC, Trial, Tuning, choose, chosen, options_text, plan_chosen, plan_trials
from fedamm_pl.terminal import printable, say

SHOWN = 5
"""Largest number of runs that a message names."""
KNOWN = {"class_counts": [1] * 10, "shot_groups": {"all": [*range(10)]}}
STAND_INS = {"algorithm": {"num_classes": 10, "in_channels": 3, "model": "small_cnn", "info": KNOWN}}
"""Group -> values for parameters that a run sets itself; a class is made with them to check its options."""


def compare(words: Sequence[str]) -> None:
    """Run the sub-command.

    Args:
        words: The command line after ``compare``.
    """
    try:
        _compare(words)
    except StopSignal as stop:
        stop.hint = "the same command continues: it skips finished runs and goes on with the others"
        raise


def _compare(words: Sequence[str]) -> None:
    parser = Parser(
        prog="fedamm compare", description="Compares methods, seeds and settings in one table.", allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A YAML file with these options.")
    with attribute_docstrings():
        parser.add_class_arguments(CompareConfig, instantiate=False)
    try:
        words = expanded(words)
        check_config_files(words, "compare")
        check_values_given(words)
        parsed = parser.parse_args(words)
        name = Path(str(parsed.config[-1])).stem if parsed.config else "compare"
        values = {field.name: parsed[field.name] for field in dataclasses.fields(CompareConfig)}
        tuned = TuningConfig(**vars(parsed.tuning)) if parsed.tuning else None
        config, resolve = CompareConfig(**{**values, "tuning": tuned}), resolver()
        check_linked(config.grid)
        if "seed" in config.grid:
            raise ValueError("Expected `seeds` to give the seeds of all settings, got `seed` in the grid.")
        folder = Path(os.path.expanduser(config.dir or Path("runs") / name))
        runs, trials = plan(config, folder, resolve), plan_trials(config, folder, resolve)
        check_before(folder, runs, trials)
        with lock_folder(folder), contextlib.ExitStack() as stack:
            begin: Start = start
            jobs = config.jobs
            if config.address and jobs:
                begin, jobs = stack.enter_context(on_cluster(config.address, config.cpus_per_run, config.gpus_per_run))
            tuning, failed = tune(trials, config, folder, begin, jobs) if config.tuning else (None, [])
            if tuning:
                runs = plan_chosen(config, folder, resolve, tuning)
                require_different_runs(runs)
                check_folders(runs)
            failed += execute(runs, jobs, begin=begin)
            say("\n" + write_results(folder, runs, config.reference, config.groups, tuning, config.budget))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # such as a full disk; the runs themselves are complete
        fail(f"{error.strerror or error} ({error.filename or folder}); the same command continues")
    say(f"results in {printable(str(folder))}")
    if failed:
        what = "failed" if config.jobs else "are not finished"
        fail(f"{len(failed)} of {len(runs) + len(trials)} runs {what}: {listed(failed)}")


def listed(runs: Sequence[PlannedRun]) -> str:
    """Return the names of runs as text; if there are many, only of the first ones."""
    more = f"; and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    return "; ".join(map(str, runs[:SHOWN])) + more


def check_before(folder: Path, runs: Sequence[PlannedRun], trials: Sequence[Trial]) -> None:
    """Check what can be checked before the first run; if there are tuning runs, print the number of runs.

    Raises:
        ValueError: If a folder holds something else, or there is tuning but the data have no validation set.
    """
    tuned = list(dict.fromkeys(trial.method for trial in trials))
    first = [*(trial.run for trial in trials), *(run for run in runs if run.method not in tuned)]
    require_different_runs(first)
    check_folders(first)
    if trials:
        refuse_links(folder)
        check_validation([trial.run for trial in trials])
        say(f"{len(trials)} tuning runs, then {len(runs)} reported runs")
    _loaded.cache_clear()  # each run loads them itself


def check_validation(runs: Sequence[PlannedRun]) -> None:
    """Check that all runs have a validation set.

    Data are loaded only if no option gives them a validation set, to see whether they include one.

    Raises:
        ValueError: If a run has none.
    """
    for run in runs:
        data = yaml.safe_load(run.config)["data"]
        if (
            not data["init_args"].get("num_val_per_class")
            and not loaded(data["class_path"], data["init_args"]).has_validation
        ):
            raise ValueError(
                "Expected `num_val_per_class` to be 1 or more, or data with a validation set, for `tuning`, got none."
            )


def loaded(class_path: str, options: Mapping[str, Any]) -> Any:
    """Return a data module, set up; the same one for the same options.

    Raises:
        ValueError: If it cannot be made or loaded.
    """
    kept = {name: value for name, value in options.items() if name not in LINKED["data"]}
    with in_one_line():
        return _loaded(class_path, json.dumps(kept))


@lru_cache(maxsize=1)
def _loaded(class_path: str, options: str) -> Any:
    data = class_at(class_path)(**json.loads(options))
    data.setup()
    return data


def class_at(path: str) -> Any:
    """Return the class at an import path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def tune(
    trials: Sequence[Trial], config: CompareConfig, folder: Path, begin: Start, jobs: int
) -> tuple[Tuning, list[PlannedRun]]:
    """Run the trials and choose among the candidates.

    Returns:
        The tuning, and the runs that failed. Runs that gave up after too many failed rounds do not count as failed.
    """
    assert config.tuning is not None
    failed = execute([trial.run for trial in trials if not trial.stopped], jobs, METRIC, begin)
    failed = [trial.run for trial in trials if trial.run in failed and not trial.stopped]
    if failed and not jobs:
        raise ValueError(f"Expected all {len(trials)} runs for tuning to be finished, got {len(failed)} that are not.")
    tuning = choose(trials, config.tuning)
    write_tuning(folder, tuning)
    for choice in tuning.choices:
        place = "".join(f", {name} {value}" for name, value in choice.setting.items())
        say(printable(f"{choice.method}{place}: {options_text(chosen(choice))}"))
    return tuning, failed


def fail(reason: str) -> NoReturn:
    """Print one line to standard error and exit with status 1."""
    say(f"fedamm: error: {one_line(reason)}", sys.stderr)
    sys.exit(1)


def resolver() -> Callable[[dict[str, Any]], tuple[str, int]]:
    """Return a function: options of a run -> its complete configuration as YAML, and its number of rounds."""
    parser = build_parser()

    @cache
    def check_class(group: str, class_path: str, options: str) -> None:
        # finds wrong options now, not hours later when the run starts
        kind, values = class_at(class_path), json.loads(options)
        not_taken = STAND_INS.get(group, {}).keys() - parameters_of(kind)
        kind(**{name: value for name, value in values.items() if name not in not_taken})

    known: dict[str, tuple[str, int]] = {}

    def resolve(options: dict[str, Any]) -> tuple[str, int]:
        anyone = {**options, "seed": 0}  # checked once for all seeds, since a check takes 50 ms
        key = json.dumps(anyone, default=repr)
        if key not in known:
            known[key] = resolved(anyone)
        text, num_rounds = known[key]
        return text.replace("seed: 0\n", f"seed: {options['seed']}\n", 1), num_rounds

    def resolved(options: dict[str, Any]) -> tuple[str, int]:
        with in_one_line():
            config = parser.parse_object(options)
        check_values(config)
        for group, base in GROUPS.items():
            if group not in OFFERED:
                base(**vars(config[group]))
                continue
            values = vars(config[group].get("init_args") or argparse.Namespace())
            values = {name: value for name, value in values.items() if name not in LINKED.get(group, ())}
            try:
                text = json.dumps({**values, **STAND_INS.get(group, {})})
            except TypeError:  # options that are objects are made and checked in the process of the run
                continue
            class_path = config[group].class_path
            try:
                with in_one_line():
                    check_class(group, class_path, text)
            except ValueError:
                if group != "algorithm" or class_path.startswith("fedamm_pl."):
                    raise
                # a class of your own may need the real data or its own network
                data = loaded(config.data.class_path, vars(config.data.init_args))
                real = {"num_classes": data.num_classes, "in_channels": data.in_channels, "info": data.info}
                with in_one_line():
                    check_class(group, class_path, json.dumps({**real, **values}))
        return dump(parser, config), int(config.federation.num_rounds)

    return resolve
