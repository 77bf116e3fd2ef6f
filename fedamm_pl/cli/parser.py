"""The parser of a run's options, checks that it lacks, and the resulting configuration as YAML."""

import argparse
import inspect
import json
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from pytorch_lightning.loggers import Logger

from fedamm_pl.cli.config_files import check_config_files, check_values_given
from fedamm_pl.cli.messages import one_line, unknown_option
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED, OutputConfig, find_class, options_of
from fedamm_pl.cli.signals import StopSignal
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Executor
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.terminal import say
from fedamm_pl.version import __version__


class Parser(ArgumentParser):
    """A parser that reports an error in one line and exits with status 2.

    The line names the option, its value and the allowed values.
    """

    owner: type | None = None
    """The class whose options are read, if the parser was made for one class; None for the parser of a run."""

    def __init__(self, *args: Any, prog: str = "fedamm", **options: Any) -> None:
        super().__init__(*args, prog=prog, **options)

    def add_class_arguments(
        self, theclass: type, nested_key: str | None = None, *args: Any, **options: Any
    ) -> list[str]:
        """Add the options of a class; see ``jsonargparse``."""
        if nested_key is None and inspect.isclass(theclass):
            self.owner = theclass
        return list(super().add_class_arguments(theclass, nested_key, *args, **options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line to standard error and exit."""
        say(f"fedamm: error: {one_line(message, self.owner)}", sys.stderr)
        sys.exit(2)


def build_parser(view: Callable[[FederatedDataModule], Any] = lambda data: data) -> Parser:
    """Return the parser of a run; its help is in :mod:`fedamm_pl.cli.help`.

    Args:
        view: Data -> an object with the parameters that the algorithm takes from the data. If clients are on other
            machines, these may have to be asked first.
    """
    parser = Parser(allow_abbrev=False, add_help=False, version=__version__)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=FederatedDataModule, default={"class_path": "fedamm_pl.FederatedDataModule"})
    parser.add_argument("--algorithm", type=FederatedModule, required=True)
    parser.add_argument("--federation", type=FederationConfig)
    parser.add_argument("--executor", type=Executor, default={"class_path": "Sequential"})
    parser.add_argument("--trainer", type=TrainerConfig, default=TrainerConfig())
    parser.add_argument("--logger", type=bool | list[Logger], default=True)
    parser.add_argument("--output", type=OutputConfig, default=OutputConfig())
    parser.add_argument("--dry_run", action="store_true")
    parser.link_arguments("seed", "data.init_args.seed")
    for name in LINKED["algorithm"]:
        known = _attribute(name, view)
        parser.link_arguments("data", f"algorithm.init_args.{name}", known, apply_on="instantiate")
    return parser


@contextmanager
def attribute_docstrings() -> Iterator[None]:
    """Make the parser use the docstring under a field as its help.

    This is not on by default, since the parser would then read the sources of all of Lightning's classes.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        yield
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def _attribute(name: str, view: Callable[[FederatedDataModule], Any]) -> Callable[[FederatedDataModule], Any]:
    return lambda data: getattr(view(data), name)


def parse(parser: Parser, words: Sequence[str]) -> Namespace:
    """Return the configuration that a command line gives.

    Raises:
        ValueError: If an option has a wrong value that the parser itself accepts; the message names it.
    """
    check_config_files(words, "run")
    check_values_given(words)
    with in_one_line():
        config = parser.parse_args(words)
    check_values(config)
    return config


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn errors raised while classes, also those of users, are imported and made into an error of one line.

    Raises:
        ValueError: With the type, the text and the place of the error.
    """
    try:
        yield
    except (ValueError, OverflowError, BrokenPipeError):
        raise
    except RecursionError as error:
        raise ValueError("Expected values of options to be plain, got one that is nested too deeply.") from error
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, StopSignal) or where.filename in (__file__, argparse.__file__):
            raise  # the parser exits
        raise ValueError(f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})") from error


def check_values(config: Namespace) -> None:
    """Check what the parser accepts but should not: groups that are not mappings, and null for a required value.

    Raises:
        ValueError: If there is such a value; the message names it.
    """
    for group, base in GROUPS.items():
        values, owner = config[group], base
        if group in OFFERED:
            if values is None:
                raise ValueError(f"Expected --{group} to be a class or a mapping of options, got null.")
            owner = find_class(group, values.class_path)
            if unknown := sorted(values.get("dict_kwargs") or {}):
                raise ValueError(unknown_option(unknown[0], owner))
            values = values.get("init_args") or argparse.Namespace()
        if not isinstance(values, argparse.Namespace):
            raise ValueError(f"Expected --{group} to be a mapping of options, got {values!r:.60}.")
        for name, parameter in options_of(owner).items():
            optional = type(None) in typing.get_args(parameter.annotation)
            if vars(values).get(name, "") is None and not optional:
                raise ValueError(f"Expected --{group}.{name} to have a value, got null.")


def dump(parser: Parser, config: Namespace) -> str:
    """Return the configuration as YAML for ``--config``, without ``output.dir``."""
    shown = config.clone()
    shown.output.dir = None
    content = with_texts(json.loads(parser.dump(shown, format="json", skip_unset=False)), shown)
    content["output"].pop("dir", None)
    content.pop("dry_run", None)  # not a part of the experiment
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False))


def with_texts(content: Any, given: Any) -> Any:
    """Return dumped options with texts as they were given; the parser's dump turns a text like 1e5 into a number."""
    if isinstance(content, dict) and isinstance(given, argparse.Namespace):
        values = vars(given)
        return {name: with_texts(value, values.get(name)) for name, value in content.items()}
    return given if isinstance(given, str) else content


class Dumper(yaml.SafeDumper):
    """YAML dumper that writes no aliases and quotes texts like 1e5: numbers to the parser, but not to PyYAML."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values in full."""
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Represent a text, with quotes if it can be read as a number."""
        try:
            float(text)
        except ValueError:
            return self.represent_str(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")


Dumper.add_representer(str, Dumper.represent_text)
