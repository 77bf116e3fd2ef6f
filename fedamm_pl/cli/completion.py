"""``fedamm completion``: a script with which bash completes the command line without starting the program."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence

from fedamm_pl.cli.methods import MethodsConfig
from fedamm_pl.cli.options import GROUPS, OFFERED, offered, options_of
from fedamm_pl.cli.parser import Parser
from fedamm_pl.cli.report import ReportConfig
from fedamm_pl.cli.shipped import COMPARISON, names
from fedamm_pl.models import MODELS
from fedamm_pl.results.comparison_config import CompareConfig
from fedamm_pl.terminal import say

FLAGS = ("--help", "--version", "--print_config", "--dry_run", "--method.help")
FOLDERS = ("--output.dir", "--data.root", "--dir")
SHELLS = ("bash",)
FILES = """
_fedamm_run_file() {{ compgen -W "{runs}" -- "$1"; compgen -f -- "$1"; }}
_fedamm_comparison_file() {{ compgen -W "{comparisons}" -- "$1"; compgen -f -- "$1"; }}
"""
"""Functions of the script that complete ``--config`` with names of shipped configurations and with files."""


def completion(words: Sequence[str]) -> None:
    """Run the sub-command.

    Args:
        words: The command line after ``completion``.
    """
    about = "Prints a script with which the shell completes commands, options, and the names of shipped configurations."
    parser = Parser(prog="fedamm completion", description=about, allow_abbrev=False)
    parser.add_argument("shell", choices=SHELLS, help="Its name.")
    shell = parser.parse_args(words).shell
    try:
        say(script(shell))
    except ImportError:
        parser.error("Expected the package shtab to be installed, got none: pip install shtab")


def script(shell: str) -> str:
    """Return the script; it contains all commands, options and values that it can complete.

    Args:
        shell: One of ``SHELLS``.

    Raises:
        ImportError: If shtab is not installed.
    """
    import shtab  # an optional dependency

    program = argparse.ArgumentParser("fedamm", add_help=False)
    places = program.add_subparsers()
    run, compare, report, methods, printer = (
        places.add_parser(name, add_help=False, help=name)  # shtab leaves out sub-commands without a help text
        for name in ("run", "compare", "report", "methods", "completion")
    )
    for place in (program, run):
        _add(place, run_options(), shtab)
        place.add_argument("--config").complete = {"bash": "_fedamm_run_file"}  # type: ignore[attr-defined]
    _add(compare, {"--help": None, **_fields(CompareConfig)}, shtab)
    compare.add_argument("--config").complete = {"bash": "_fedamm_comparison_file"}  # type: ignore[attr-defined]
    _add(report, {"--help": None, **_fields(ReportConfig)}, shtab)
    report.add_argument("runs", nargs="+").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    _add(methods, {"--help": None, **_fields(MethodsConfig)}, shtab)
    methods.add_argument("methods", nargs="*", choices=[kind.__name__ for kind in OFFERED["algorithm"]])
    _add(printer, {"--help": None}, shtab)
    printer.add_argument("shell", choices=SHELLS)
    comparisons = [name for name in names("") if name.startswith(COMPARISON)]
    runs = [name for name in names("") if name not in comparisons]
    comparisons += [f"protocol/{name}" for name in names("protocol")]
    functions = FILES.format(runs=" ".join(runs), comparisons=" ".join(comparisons))
    return str(shtab.complete(program, shell, preamble=functions))


def run_options() -> dict[str, list[str] | None]:
    """Return option of a run -> values to offer, None if it takes no value.

    The options of a group are those of all its classes.
    """
    found: dict[str, list[str] | None] = dict.fromkeys(FLAGS)
    found |= {"--method": names("method"), "--seed": [], "--logger": ["true", "false"]}
    for group in GROUPS:
        kinds = [kind.__name__ for kind in offered(group)]
        found[f"--{group}.help"] = kinds if group in OFFERED else None
        if group in OFFERED:
            found[f"--{group}"] = [*(names("data") if group == "data" else ()), *kinds]
        for owner in offered(group):
            for name, parameter in options_of(owner).items():
                known = found.get(f"--{group}.{name}") or []
                found[f"--{group}.{name}"] = list(dict.fromkeys([*known, *values_of(parameter.annotation)]))
    found["--algorithm.model"] = [*MODELS]
    return found


def values_of(annotation: object) -> list[str]:
    """Return the values that an option can have if they are a fixed set of words; else an empty list.

    Example:
        >>> values_of(bool), values_of(typing.Literal["a", "b"] | None), values_of(float)
        (['true', 'false'], ['a', 'b'], [])
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [str(value) for value in arguments]
    if origin in (typing.Union, types.UnionType):
        return [value for part in arguments for value in values_of(part)]
    return ["true", "false"] if annotation is bool else []


def _fields(config: type) -> dict[str, list[str] | None]:
    """Return option of a sub-command -> values to offer."""
    hints = typing.get_type_hints(config)
    return {f"--{field.name}": values_of(hints[field.name]) for field in dataclasses.fields(config)}


def _add(parser: argparse.ArgumentParser, options: Mapping[str, list[str] | None], shtab: types.ModuleType) -> None:
    """Add options to a parser that is only used to make the script."""
    for option, values in options.items():
        if values is None:
            parser.add_argument(option, action="store_true")
            continue
        added = parser.add_argument(option, choices=values or None)
        if option in FOLDERS:
            added.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
