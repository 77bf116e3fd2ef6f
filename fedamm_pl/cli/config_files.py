"""Configuration files and values before the parser takes them: plain YAML of a bounded size, and of the command's own kind."""

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
"""Of one file or value, after its aliases are put in."""
PARSER_LOADER = get_loader("yaml")


def check_config_files(words: Sequence[str], command: Command) -> None:
    """Check that configuration files are YAML mappings, and of this command.

    Raises:
        ValueError: If one is not, or does not exist; the message names the file.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    names += [value for option, value in itertools.pairwise(words) if option == "--config"]
    missing = []
    for name in names:
        try:
            path = Path(os.path.expanduser(name))
            if not path.is_file():
                if not path.exists() and isinstance(yaml.safe_load(name), str):  # the parser takes a mapping too
                    missing.append(name)
                continue
            text = path.read_text()
            check_size(text)
            content = yaml.safe_load(text)
        except Exception as error:  # mangled YAML may raise anything
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
    """Say that there is no such configuration, and which could be meant."""
    if instead := option_for(name):
        return f"{name} is a configuration: {instead}"
    shipped = whole(command)
    hint = f"; did you mean {meant}?" if (meant := similar(Path(name).stem, shipped)) else "."
    return f"Expected --config to be a file, or one that is shipped ({', '.join(shipped)}), got {name:.200} and no such file{hint}"


def check_kind(name: str, content: dict[Any, Any], command: Command) -> None:
    """Check that a configuration is not one of the other command, and that a comparison has what its runs share below base.

    Raises:
        ValueError: If it is; the message says which command takes it, or what to move.
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
    """Check that options are the user's to give, and that no value is YAML that holds itself or is too large for the memory.

    Raises:
        ValueError: If one does; the message shows it.
    """
    check_linked(word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") else word
        try:
            check_size(value)
        except yaml.YAMLError:  # for the parser to say
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected values of options to be plain, got {value:.60} ({error})") from error


def check_linked(names: Iterable[str]) -> None:
    """Check that none of these options is one that follows from others, which the parser would pass over.

    Raises:
        ValueError: If one is; the message says what stands in its place.
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
    """Yield the names of options, and of groups of them, as the command line has them."""
    for name, value in options.items():
        yield str(name)
        if isinstance(value, dict) and str(name).partition(".")[0] in GROUPS:
            yield from (f"{name}.{inner}" for inner in value)
            if isinstance(inner := value.get("init_args"), dict):
                yield from (f"{name}.{own}" for own in inner)


def check_size(text: str) -> None:
    """Check how many values a YAML text has, without making them: a few aliases, nested, stand for more than memory holds.

    Raises:
        ValueError: If they are too many, or one holds itself.
        yaml.YAMLError: If it is no YAML.
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
    """Load YAML as the parser does, once its size is checked: also that of files which configuration files name."""
    try:
        check_size(text)
    except ValueError as error:
        raise ValueError(f"Expected configuration files to be plain, got {text:.60} ({error})") from error
    return PARSER_LOADER(text)


set_loader("yaml", load_yaml, (yaml.YAMLError,))
