"""``fedamm compare``."""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from fedamm_pl.cli.config_files import check_config_files, check_values_given
from fedamm_pl.cli.messages import one_line
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED, parameters_of
from fedamm_pl.cli.parser import Parser, attribute_docstrings, build_parser, check_values, dump, in_one_line
from fedamm_pl.files import lock_folder
from fedamm_pl.results.comparison import CompareConfig, check_folders, execute, plan
from fedamm_pl.results.comparison_files import write_results
from fedamm_pl.terminal import printable, say

KNOWN = {"class_counts": [1] * 10, "shot_groups": {"all": [*range(10)]}}
STAND_INS = {"algorithm": {"num_classes": 10, "in_channels": 3, "model": "small_cnn", "info": KNOWN}}
"""Group -> values with which its class, where it takes them, is made to check its options."""


def compare(words: Sequence[str]) -> None:
    """Run the sub-command.

    Args:
        words: The command line after ``compare``.
    """
    parser = Parser(prog="fedamm compare", description="Methods x seeds x settings in one table.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file with these options.")
    with attribute_docstrings():
        parser.add_class_arguments(CompareConfig, instantiate=False)
    try:
        check_config_files(words, "compare")
        check_values_given(words)
        parsed = parser.parse_args(words)
        name = Path(str(parsed.config[-1])).stem if parsed.config else "compare"
        config = CompareConfig(**{field.name: parsed[field.name] for field in dataclasses.fields(CompareConfig)})
        folder = Path(os.path.expanduser(config.dir or Path("runs") / name))
        runs = plan(config, folder, resolver())
        check_folders(runs)
        with lock_folder(folder):
            failed = execute(runs, config.jobs)
            say("\n" + write_results(folder, runs, config.reference))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # a full disk; the runs themselves are whole
        fail(f"{error.strerror or error} ({error.filename or folder}); the same command continues")
    say(f"results in {printable(str(folder))}")
    if failed:
        fail(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}")


def fail(reason: str) -> NoReturn:
    """Print one line to standard error and exit with status 1."""
    say(f"fedamm: error: {one_line(reason)}", sys.stderr)
    sys.exit(1)


def resolver() -> Callable[[dict[str, Any]], tuple[str, int]]:
    """Return a function: the options of a run -> its whole configuration as YAML, and its number of rounds."""
    parser = build_parser()

    @cache
    def check_class(group: str, class_path: str, options: str) -> None:
        # found now, not in a process of its own hours later; the data are not loaded for it
        module, _, name = class_path.rpartition(".")
        kind, values = getattr(importlib.import_module(module), name), json.loads(options)
        not_taken = STAND_INS.get(group, {}).keys() - parameters_of(kind)
        kind(**{name: value for name, value in values.items() if name not in not_taken})

    def resolve(options: dict[str, Any]) -> tuple[str, int]:
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
            except TypeError:  # options that are objects are made, and checked, in the run's own process
                continue
            with in_one_line():
                check_class(group, config[group].class_path, text)
        return dump(parser, config), int(config.federation.num_rounds)

    return resolve
