"""Names of the configurations that come with the package, as in ``--data cifar10 --method fedamm``."""

import difflib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Folders of the shipped configurations: in an installed package, and in a clone of the repository."""
COMPARISON = "compare"
"""Prefix of the names of shipped comparisons."""


def folder() -> Path:
    """Return the folder of the shipped configurations."""
    return next((found for found in FOLDERS if found.is_dir()), FOLDERS[0])


def names(kind: str) -> list[str]:
    """Return the names of the shipped configurations of a kind: ``data``, ``method``, ``protocol``; empty: others."""
    return sorted(path.stem for path in (folder() / kind).glob("*.yaml"))


def whole(command: str) -> list[str]:
    """Return the names of the shipped configurations that are complete for a command, ``run`` or ``compare``."""
    return [name for name in names("") if name.startswith(COMPARISON) == (command == "compare")]


def option_for(word: str) -> str | None:
    """Return the option or command for a shipped configuration; None if there is none of this name.

    Example:
        >>> option_for("quickstart"), option_for("cifar10"), option_for("nonsense")
        ('fedamm --config quickstart', '--data cifar10', None)
    """
    for command, program in (("run", "fedamm"), ("compare", "fedamm compare")):
        if word in whole(command):
            return f"{program} --config {word}"
    return next((f"--{kind} {word}" for kind in ("data", "method") if word in names(kind)), None)


def about(kind: str, name: str) -> str:
    """Return the comment at the start of a shipped configuration as one line."""
    lines = (folder() / kind / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def expanded(words: Sequence[str]) -> list[str]:
    """Return a command line in which names of shipped configurations are replaced by ``--config`` and a file.

    ``--method NAME`` and, if NAME is a shipped configuration of data, ``--data NAME`` refer to files in
    ``configs/method`` and ``configs/data``. The file of the data comes first, so that the options of a method override
    it. If a file of ``--config`` does not exist, a shipped one of this name is used.

    Args:
        words: The command line without the program's name.

    Raises:
        ValueError: If there is no shipped method of this name.
    """
    chosen: dict[str, str] = {}
    rest: list[str] = []
    place = None
    pairs = iter(_split(words))
    for word in pairs:
        if word in ("--method", "--data", "--config"):
            name = next(pairs, None)
            if name is None:
                rest.append(word)
            elif word == "--config":
                rest += [word, _found(name)]
            elif word == "--data" and name not in names("data"):
                rest += [word, name]
            else:
                place = len(rest) if place is None else place
                chosen[word] = str(_named(word.removeprefix("--"), name))
        else:
            rest.append(word)
    files = [word for kind in ("--data", "--method") if kind in chosen for word in ("--config", chosen[kind])]
    return [*rest[:place], *files, *rest[place:]] if files else rest


def _split(words: Sequence[str]) -> list[str]:
    """Return the words, with ``--option=value`` split in two for ``--method``, ``--data`` and ``--config``."""
    found: list[str] = []
    for word in words:
        option, sign, value = word.partition("=")
        found += [option, value] if sign and option in ("--method", "--data", "--config") else [word]
    return found


def _named(kind: str, name: str) -> Path:
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 3) or known
        raise ValueError(
            f"Expected --{kind} to be one of the shipped {kind}s, like {', '.join(near[:3])}, got {name:.60}."
        )
    return folder() / kind / f"{name}.yaml"


def _found(name: str) -> str:
    """Return the path of a configuration: as given if the file exists, else that of the shipped one if there is one."""
    try:
        if os.path.isfile(os.path.expanduser(name)):
            return name
        parts = Path(name).parts
        shipped = folder().joinpath(*(parts[1:] if parts[:1] == ("configs",) else parts))
        for path in (shipped, shipped.with_name(f"{shipped.name}.yaml")):
            if path.is_file() and folder() in path.resolve().parents:
                return str(path)
    except (OSError, ValueError):  # not a valid file name
        pass
    return name
