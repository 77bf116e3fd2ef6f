"""Clients that are named in the data: their names, checks of these, and their examples in the training set."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.sources.reading import UnusableFileError

MAX_NAME = 200
"""Maximum number of characters in the name of a client."""
SHOWN_NAME = 40
"""Maximum number of characters of the name that are shown in a line about the client."""


def require_name(name: object, where: str) -> None:
    """Check a client's name.

    Args:
        name: The name.
        where: The owner of the name, for the message.

    Raises:
        UnusableFileError: If it is not a text, is empty, or is too long.
    """
    if not isinstance(name, str):
        raise UnusableFileError(f"Expected the name of {where} to be a text, got {name!r:.80}.")
    if not name.strip():
        raise UnusableFileError(f"Expected the name of {where} not to be empty, got {name!r:.80}.")
    if len(name) > MAX_NAME:
        raise UnusableFileError(
            f"Expected the name of {where} to have at most {MAX_NAME} characters, got {len(name):,}: {name:.40}..."
        )


def require_different(names: Iterable[str], where: str) -> None:
    """Check that no two names look the same, since an accented letter can be encoded as one character or two.

    Args:
        names: The names, all of them different.
        where: The source of the clients, for the message.

    Raises:
        UnusableFileError: If two names have different encodings but look the same.
    """
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(unicodedata.normalize("NFC", name), name) != name:
            raise UnusableFileError(
                f"Expected the names of clients of {where} to differ, got {name!r:.80} with its accents encoded in two ways: use one."
            )


def client_order(owners: Sequence[str]) -> list[str]:
    """Return the names of the training examples' clients in order, with numbers in the names sorted by value.

    Args:
        owners: The name of each training example's client, length N.

    Raises:
        UnusableFileError: If a name is not a text, is empty, or is too long (the message names the example), or if two
            names look the same.

    Example:
        >>> client_order(["site 10", "site 2", "site 10", "a"])
        ['a', 'site 2', 'site 10']
    """
    first: dict[str, int] = {}
    for index, name in enumerate(owners):
        if name not in first:
            require_name(name, f"the client of training example {index}")
            first[name] = index
    require_different(first, "training examples")
    return sorted(first, key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split("([0-9]+)", name)
    return [(0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts) if part], name


def by_client(owners: Sequence[str], kept: Indices) -> tuple[list[str], list[Indices]]:
    """Assign the remaining examples to the clients that are named in the data.

    Args:
        owners: The name of each training example's client, length N.
        kept: Sorted indices of the examples to assign, shape (n,).

    Returns:
        The names of all K clients, including those without remaining examples, and for each client the positions of its
        examples in ``kept``: K disjoint, sorted index arrays that hold every example.

    Raises:
        UnusableFileError: If the name of a client cannot be used.
    """
    names = client_order(owners)
    numbers = {name: number for number, name in enumerate(names)}
    holders = np.array([numbers[owners[index]] for index in kept], dtype=np.int64)
    order = np.argsort(holders, kind="stable")
    sizes = np.bincount(holders, minlength=len(names))
    return names, np.split(order.astype(np.int64), np.cumsum(sizes)[:-1])


def shown_name(name: str) -> str:
    """Return a client's name for a line about it, quoted and shortened if it is long; a number is returned unchanged.

    Example:
        >>> shown_name("3"), shown_name("hospital A"), len(shown_name(100 * "x"))
        ('3', "'hospital A'", 42)
    """
    if name.isascii() and name.isdecimal():
        return name
    return repr(name if len(name) <= SHOWN_NAME else name[: SHOWN_NAME - 1] + "…")


def shown_client(client: int, names: Sequence[str]) -> str:
    """Return the name of a client for a line about it, or its number if it has no name."""
    return shown_name(names[client]) if client < len(names) else str(client)
