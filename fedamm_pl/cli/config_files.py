"""Checks of configuration files and values before they are parsed: their YAML, their size and their command."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import get_loader, set_loader

from fedamm_pl.cli.options import GROUPS, LINKED
from fedamm_pl.cli.shipped import option_for, whole
from fedamm_pl.hints import similar

Command = Literal["run", "compare"]

MAX_VALUES = 100_000
"""Largest number of values in one file or option, with aliases expanded."""
PARSER_LOADER = get_loader("yaml")


def check_config_files(words: Sequence[str], command: Command) -> None:
    """Check that configuration files are YAML mappings with the options of a command.

    Raises:
        ValueError: If a file is not, or does not exist; the message names it.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    names += [value for option, value in itertools.pairwise(words) if option == "--config"]
    missing = []
    for name in names:
        try:
            path = Path(os.path.expanduser(name))
            if not path.is_file():
                if not path.exists() and isinstance(yaml.safe_load(name), str):  # the parser also accepts YAML
                    missing.append(name)
                continue
            text = path.read_text()
            check_size(text)
            content = yaml.safe_load(text)
        except Exception as error:  # malformed YAML may raise anything
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"Expected --config {name:.200} to be YAML, got a file that cannot be read: {reason}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"Expected --config {name} to be a YAML mapping of options, got {content!r:.60}.")
        check_kind(name, content, command)
        shared = content.get("base") if command == "compare" else content
        check_linked(_dotted(shared) if isinstance(shared, dict) else ())
    if missing:
        raise ValueError(no_such_file(missing[0], command))


def no_such_file(name: str, command: Command) -> str:
    """Return the message for a missing configuration file, with a suggestion."""
    if instead := option_for(name):
        return f"{name} is a configuration: {instead}"
    shipped = whole(command)
    hint = f"; did you mean {meant}?" if (meant := similar(Path(name).stem, shipped)) else "."
    return f"Expected --config to be a file, or one that is shipped ({', '.join(shipped)}), got {name:.200} and no such file{hint}"


def check_kind(name: str, content: dict[Any, Any], command: Command) -> None:
    """Check that a configuration belongs to a command, and that a comparison has the options of its runs below base.

    Raises:
        ValueError: If it does not; the message says which command takes it, or which option to move.
    """
    first = {str(option).partition(".")[0] for option in content}
    kind: Command = "compare" if {"methods", "base"} & first else "run" if GROUPS.keys() & first else command
    if kind != command:
        what = {"run": "a run", "compare": "a comparison"}
        instead = {"run": "fedamm --config", "compare": "fedamm compare --config"}
        raise ValueError(
            f"Expected --config {name} to hold the options of {what[command]}, got those of {what[kind]}: "
            f"{instead[kind]} {name} takes them."
        )
    beside = [group for group in GROUPS if group in first and group != "output"]  # for output there is --dir
    if command == "compare" and beside:
        raise ValueError(
            f"Expected --config {name} to have the options of its runs below base, got {beside[0]} beside it."
        )


def check_values_given(words: Sequence[str]) -> None:
    """Check that all options can be given, and that no value is YAML that contains itself or is too large.

    Raises:
        ValueError: If an option cannot be given or a value is not allowed; the message shows it.
    """
    check_linked(word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") else word
        try:
            check_size(value)
        except yaml.YAMLError:  # the parser reports it
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected values of options to be plain, got {value:.60} ({error})") from error


def check_linked(names: Iterable[str]) -> None:
    """Check that no option is given that follows from others; the parser would ignore it without an error.

    Raises:
        ValueError: If one is; the message says what to use instead.
    """
    for name in names:
        group, _, last = name.replace(".init_args", "").partition(".")
        if last in LINKED.get(group, ()):
            instead = (
                f"--{last} in place of --{group}.{last}"
                if last == "seed"
                else f"--{group}.{last} to be left to the data"
            )
            raise ValueError(f"Expected {instead}, got {name}.")


def _dotted(options: dict[Any, Any]) -> Iterator[str]:
    """Yield the names of options and of groups of options as on the command line."""
    for name, value in options.items():
        yield str(name)
        if isinstance(value, dict) and str(name).partition(".")[0] in GROUPS:
            yield from (f"{name}.{inner}" for inner in value)
            if isinstance(inner := value.get("init_args"), dict):
                yield from (f"{name}.{own}" for own in inner)


def check_size(text: str) -> None:
    """Count the values in a YAML text without creating them, since a few nested aliases can expand beyond the memory.

    Raises:
        ValueError: If there are too many values, or one contains itself.
        yaml.YAMLError: If the text is not YAML.
    """
    if "&" not in text:  # without an anchor there is no alias
        return
    waiting, seen = [yaml.compose(text, yaml.SafeLoader)], 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.CollectionNode):
            seen += len(node.value)
            if seen > MAX_VALUES:
                raise ValueError(f"with its aliases it holds itself or more than {MAX_VALUES:,} values")
            waiting += itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value


def load_yaml(text: str) -> Any:
    """Check the size of YAML and load it as the parser does; this includes files that configuration files refer to."""
    try:
        check_size(text)
    except ValueError as error:
        raise ValueError(f"Expected configuration files to be plain, got {text:.60} ({error})") from error
    return PARSER_LOADER(text)


set_loader("yaml", load_yaml, (yaml.YAMLError,))
