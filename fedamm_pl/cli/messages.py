"""Error messages of the parser and of the library, reworded as one line that names the options of the command line."""

import dataclasses
import re

from fedamm_pl.cli.options import GROUPS, OFFERED, group_of, imported, offered, options_of
from fedamm_pl.cli.shipped import names as shipped_names
from fedamm_pl.cli.shipped import option_for
from fedamm_pl.hints import similar
from fedamm_pl.terminal import printable

RENAMED = {"output_dir": "--output.dir", "seed": "--seed", "logger": "--logger"}
"""Parameter of the library -> option, if they have different names."""
NESTED = {"TuningConfig": "tuning"}
"""Class name of nested options -> their option. A name, since importing the class would import all of `results`."""
POSITIONAL = {"runs": "RUN"}
"""Positional argument -> its name in the help."""
START = "; start with: fedamm --config quickstart; help: fedamm --help"
"""Hint that is shown if no method is given."""
TABLES = (".csv", ".tsv", ".parquet")
FILES = (*TABLES, ".txt", ".npz")
"""File endings of data sets; a name with one of them is not a class."""
UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: (.*) Given value type: \w+ Given value: (.*)"
)
"""The parser's message for a value that has none of several types."""


def one_line(message: str, owner: type | None = None) -> str:
    """Reword a message as one line that names options; control characters become codes.

    Args:
        message: Message of the parser or the library.
        owner: The class whose options were read, if known.
    """
    return printable(reworded(message, owner))


def reworded(message: str, owner: type | None) -> str:
    """Reword a message, see :func:`one_line`."""
    message = " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    # prefix of errors of the data, raised when the algorithm asks for the number of classes and channels
    message = re.sub(r"^Call to compute_fn of link .*?\) failed: ", "", message)
    options = option_names(owner)
    message = re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)
    if missing := re.match(r"the following arguments are required: (.*)", message):
        first = f"--{nested}." if (nested := NESTED.get(getattr(owner, "__name__", ""))) else "--"
        needed = missing[1].split(", ")
        hint = START if owner is None and "algorithm" in needed else ""
        return f"required, but not given: {', '.join(POSITIONAL.get(name, first + name) for name in needed)}{hint}"
    if unknown := re.search(r"(?:Option|accept option) '([\w.]+)'|unrecognized arguments: (.*)", message):
        word = unknown[1] or unknown[2].split()[0]
        if meant := option_for(word) or (f"--config {word}" if word.endswith((".yaml", ".yml")) else None):
            return f"{word} is a configuration: {meant}"
        return unknown_option(word.split("=")[0].lstrip("-"), owner)
    if wrong := re.match(r'Parser key "([\w.]+)": (.*)', message):
        name = options.get(wrong[1], f"--{wrong[1]}")
        if wrong[1] in OFFERED and owner is None:
            got = re.sub(r"^Expected a dot import path string: |^Problem with given class_path ", "", wrong[2])
            got = re.sub(r"^Import path (\S+) does not .*", r"\1, which is not one", got)
            got = re.sub(r"^Not a valid subclass of .*? Got value: (.*?) Subclass types .*", r"\1", got)
            return unknown_class(wrong[1], got)
        text = re.sub(r"typing\.|<class '(?:\w+\.)*(\w+)'>", lambda match: match[1] or "", wrong[2])
        if union := UNION.fullmatch(text):
            return f"Expected {name} to be {alternatives(union[1])}, got {no_class(union[2]) or union[3]}"
        text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
        text = re.sub(r"^Expected an? (.*?)\. Got value: (.*)", r"to be \1, got \2", text)
        return f"Expected {name} {text}" if text.startswith("to be") else f"{name}: {text}"
    return message


def alternatives(types: str) -> str:
    """Reword the types of a union, with null as the last.

    Example:
        >>> alternatives("NoneType, float"), alternatives("bool, list[pytorch_lightning.loggers.logger.Logger]")
        ('float or null', 'bool or list[Logger]')
    """
    names = re.split(r", (?![^\[]*\])", re.sub(r"\b(\w+\.)+(?=\w)", "", types))
    return " or ".join(sorted(names, key="NoneType".__eq__)).replace("NoneType", "null")


def no_class(errors: str) -> str | None:
    """Return the name of a missing class among the errors of a union; None if no class is missing."""
    found = re.search(r"Expected a dot import path string: (\S+)", errors)
    return found and found[1]


def option_names(owner: type | None = None) -> dict[str, str]:
    """Return parameter -> option for all imported classes; if names collide, the option of the owner is used."""
    owners = [kind for group in reversed(GROUPS) for kind in imported(group)] + ([owner] if owner else [])
    return {**{name: option_of(kind, name) for kind in owners for name in options_of(kind)}, **RENAMED}


def option_of(owner: type, name: str) -> str:
    """Return the option for a parameter of a class."""
    if group := NESTED.get(owner.__name__) or group_of(owner):
        return f"--{group}.{name}"
    return f"--{name}" if dataclasses.is_dataclass(owner) else f"{name} of {owner.__name__}"


def unknown_option(name: str, owner: type | None = None) -> str:
    """Return the message for an unknown option, with a suggestion that exists for the chosen class.

    Args:
        name: The option as it was given, with or without its group.
        owner: The class whose options were read, if known.
    """
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    owner = owner or GROUPS.get(first)
    group, own = (group_of(owner), options_of(owner)) if owner else (None, {})
    if group in OFFERED and last == "class_path":
        return f"Expected --{group} to hold class_path and init_args, with the options below init_args, got both side by side"
    if group in OFFERED and owner is GROUPS[group] and owner not in OFFERED[group]:
        return f"Expected --{group} before --{group}.{last}: whose option it is depends on the class"
    chosen = owner is not None and not dataclasses.is_dataclass(owner)
    said = f"{owner.__name__} has no option {last}" if owner and chosen else f"unknown option {name}"
    if group or not owner:
        for other in GROUPS:
            if other != group and any(last in options_of(kind) for kind in offered(other)):
                return f"{said}; did you mean --{other}.{last}?"
    if group and (others := [kind.__name__ for kind in offered(group) if last in options_of(kind)]):
        said += f" ({', '.join(others)} {'has' if len(others) == 1 else 'have'})"
    elif close := similar(last, own or option_names()):
        return f"{said}; did you mean {option_of(owner, close) if owner else option_names()[close]}?"
    if chosen and own:
        return f"{said}; its options are {', '.join(own)}"
    return f"{said}; see {f'--{group}.help' if group else '--help'}"


def unknown_class(group: str, got: str) -> str:
    """Return the message for an unknown class, with a suggestion."""
    names = [kind.__name__ for kind in OFFERED[group]]
    meant = similar(got, names)
    name = got.partition(": ")[0].strip("'")
    if group == "data" and (name.endswith(FILES) or "." not in name):  # otherwise it is the import path of a class
        known = shipped_names("data")
        what = "a table" if name.endswith(TABLES) else "data of this name"
        near = f"; did you mean {close}?" if (close := meant or similar(name, known)) else ""
        return (
            f"Expected --data to be a class ({', '.join(names)}) or one of the shipped {', '.join(known)}, got {name}; "
            f"for {what}: --data.root FOLDER --data.dataset {name}{near}"
        )
    return (
        f"Expected --{group} to be one of {', '.join(names)} or the import path of your own {GROUPS[group].__name__}, got {got}"
        + (f"; did you mean {meant}?" if meant else "")
    )
