"""Help texts: a page for the program, a page for each class, and a list of the classes to choose from."""

import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence

import docstring_parser
from torch import nn

from fedamm_pl.cli.messages import unknown_class
from fedamm_pl.cli.options import GROUPS, OFFERED, find_class, offered, options_of
from fedamm_pl.cli.shipped import about, names
from fedamm_pl.models import NAMES

DESCRIPTION = """FedAMM: Long-Tailed Federated Learning via Aggregated Meta Mapping. Trains a classifier on simulated clients with
long-tailed data and writes metrics, checkpoints and the model to a folder."""
PROGRAM = {
    "--config FILE": "A YAML file with these options, or the name of a shipped one, such as quickstart; later files override earlier ones.",
    "--data NAME --method NAME": "Shipped configurations of data and method, such as cifar10 and fedamm; for a list: fedamm --method.help",
    "--seed int (default 0)": "Seed for the split, initial weights, sampling and training.",
    "--data CLASS (default FederatedDataModule)": "The data and their partition; for its options: fedamm --data.help",
    "--algorithm CLASS (required)": "The method; for a list: fedamm --algorithm.help; for the options of one: fedamm --algorithm.help CLASS",
    "--executor CLASS (default Sequential)": "Where clients train; for a list: fedamm --executor.help",
    "--trainer.OPTION": "Hardware and precision; for its options: fedamm --trainer.help",
    "--logger {true,false} or list (default true)": "A list of Lightning loggers; true means TensorBoard in the run's folder, "
    "false none; for the options of one: fedamm --logger.help CLASS",
    "--dry_run": "Print what would run and the cost of a round, write nothing (but data to be downloaded), and exit.",
    "--print_config": "Print the resulting configuration and exit.",
    "--version": "Print the version and exit.",
}
LISTED = ("federation", "output")
"""Groups whose options are on the program's page; the others have separate pages."""


def requested(words: Sequence[str]) -> str | None:
    """Return the help that a command line asks for, or None if it asks for none.

    Raises:
        ValueError: If it asks for the help of a class that does not exist.
    """
    for index, word in enumerate(words):
        option, _, name = word.partition("=")
        if option == "--method.help":
            return shipped_help()
        if option in ("-h", "--help"):
            return program_help()
        group = option.removeprefix("--").removesuffix(".help")
        if option == f"--{group}.help" and group in GROUPS:
            following = words[index + 1 : index + 2]
            if not name and following and not following[0].startswith("-"):
                name = following[0]
            return group_help(group, name if group in OFFERED else "")
    return None


def group_help(group: str, name: str = "") -> str:
    """Return the help of a class of a group; without a name, the list of classes if there are several."""
    kinds = offered(group)
    if not name and len(kinds) > 1:
        return list_help(group)
    try:
        owner = find_class(group, name) if name else kinds[0]
    except ValueError as error:
        raise ValueError(unknown_class(group, str(error))) from error
    choice = f" --{group} {name or owner.__name__}" if group in OFFERED else ""
    return page(f"fedamm{choice} [--{group}.OPTION VALUE ...]", summary(owner), *option_lines(group, owner))


def list_help(group: str) -> str:
    """Return the names of the classes of a group, each with the first line of its docstring."""
    width = max(len(kind.__name__) for kind in OFFERED[group])
    lines = []
    for kind in sorted(OFFERED[group], key=lambda kind: kind.__name__.lower()):
        first = plain(inspect.getdoc(kind) or "").partition("\n")[0]
        lines.append(wrapped(first, f"  {kind.__name__:{width}}  ", " " * (width + 4)))
    closing = (
        f"Or the import path of your own {GROUPS[group].__name__}. For the options of one: fedamm --{group}.help CLASS"
    )
    return page(f"fedamm --{group} CLASS [--{group}.OPTION VALUE ...]", "", *lines, "", wrapped(closing))


def shipped_help() -> str:
    """Return the list of the shipped configurations, each method with the comment at the start of its file."""
    known = names("method")
    width = max(map(len, known), default=0)
    lines = [wrapped(about("method", name), f"  {name:{width}}  ", " " * (width + 4)) for name in known]
    closing = "To see the content: fedamm --data NAME --method NAME --print_config"
    usage = "fedamm [run] --data NAME --method NAME [--OPTION VALUE ...]"
    return page(usage, f"Data: {', '.join(names('data'))}. Methods:", *lines, "", closing)


def program_help() -> str:
    """Return the help of the program."""
    lines = [entry(*item) for item in PROGRAM.items()]
    for group in LISTED:
        lines += ["", wrapped(summary(GROUPS[group])), *option_lines(group, GROUPS[group])]
    usage = "fedamm [run] [--config FILE] --algorithm CLASS [--OPTION VALUE ...]\n"
    usage += "       fedamm [run] --data NAME --method NAME [--OPTION VALUE ...]\n"
    usage += "       fedamm compare --help    compare methods, seeds and settings in one table\n"
    usage += "       fedamm report --help     show runs on one HTML page\n"
    usage += "       fedamm methods           what each method needs, reveals and costs\n"
    usage += "       fedamm completion bash   a script that completes its command line"
    return page(usage, DESCRIPTION, *lines)


def page(usage: str, about: str, *lines: str) -> str:
    """Lay out a page of help."""
    return "\n".join([f"usage: {usage}", "", *([wrapped(about), ""] if about else []), *lines])


def option_lines(group: str, owner: type) -> list[str]:
    """Return an entry for each option of a class."""
    return [entry(*option) for option in option_texts(group, owner).values()] or ["  It has no options."]


def option_texts(group: str, owner: type) -> dict[str, tuple[str, str]]:
    """Return option of a class -> its heading, with type and default, and its help text."""
    texts: dict[str, str] = {}
    foreign = ("pytorch_lightning", "builtins")
    for kind in itertools.takewhile(lambda kind: not kind.__module__.startswith(foreign), owner.__mro__):
        for part in docstring_parser.parse_from_object(kind).params:
            texts.setdefault(part.arg_name, part.description or "")
    if group == "algorithm":
        texts["model"] = f"{NAMES}, or the import path of a callable(num_classes, in_channels) -> Module."
    found = {}
    for name, parameter in options_of(owner).items():
        default = "required" if parameter.default is parameter.empty else f"default {shown(parameter.default)}"
        found[name] = (f"--{group}.{name} {kind_of(parameter.annotation)} ({default})", texts.get(name, ""))
    return found


def entry(head: str, text: str) -> str:
    """Return the heading of an option with its help text below it."""
    return "\n".join(filter(None, [wrapped(head, "  ", " " * 8), wrapped(plain(text), " " * 6, " " * 6)]))


def kind_of(annotation: typing.Any) -> str:
    """Return the type of an option in the terms of the command line.

    Example:
        >>> kind_of(float | None), kind_of(bool), kind_of(typing.Literal["a", "b"]), kind_of(dict[str, int])
        ('float or null', '{true,false}', '{a,b}', 'mapping')
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin in (typing.Union, types.UnionType):
        # a network as an object can be given in Python only
        parts = [part for part in arguments if not (inspect.isclass(part) and issubclass(part, nn.Module))]
        return " or ".join(map(kind_of, parts))
    special = {bool: "{true,false}", type(None): "null", dict: "mapping", list: "list", tuple: "list"}
    kind = origin or annotation
    return special.get(kind) or str(getattr(kind, "__name__", kind))


def shown(value: object) -> str:
    """Return a default as it is written on the command line.

    Example:
        >>> shown(None), shown(True), shown(1)
        ('null', 'true', '1')
    """
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def summary(owner: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return plain(inspect.getdoc(owner) or "").partition("\n\n")[0]


def plain(text: str) -> str:
    """Return a text without reStructuredText markup.

    Example:
        >>> plain("see :func:`~package.name` and ``x``")
        'see package.name and x'
    """
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`", "")


def wrapped(text: str, first: str = "", others: str = "") -> str:
    """Wrap a text to the width of the terminal, at most 120 columns, or to 80 columns if there is no terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
