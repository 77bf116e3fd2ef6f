"""Clients with names: those that the data come with, who holds what of what is left, and names that can be shown."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.sources.reading import UnusableFileError

MAX_NAME = 200
"""Characters of a client's name."""
SHOWN_NAME = 40
"""Characters of it in a line about the client."""


def require_name(name: object, where: str) -> None:
    """Check a client's name.

    Args:
        name: The name.
        where: Whose it is, for the message.

    Raises:
        UnusableFileError: If it is no text, empty, or too long.
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
    """Check that no two names look alike: an accented letter may be one character or two.

    Args:
        names: The names, no two of them equal.
        where: Whose clients they are, for the message.

    Raises:
        UnusableFileError: If two are written otherwise and are the same to a reader.
    """
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(unicodedata.normalize("NFC", name), name) != name:
            raise UnusableFileError(
                f"Expected the names of clients of {where} to differ, got {name!r:.80} with its accents encoded in two ways: use one."
            )


def client_order(owners: Sequence[str]) -> list[str]:
    """Return the names of the clients that training examples belong to, numbers in them by their value.

    Args:
        owners: The name of each training example's client, length N.

    Raises:
        UnusableFileError: If a name is no text, empty, or too long; the message says of which example. Or if two look alike.

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
    """Give each natural client what is left of its own examples.

    Args:
        owners: The name of each training example's client, length N.
        kept: Sorted indices of the examples to share out, shape (n,).

    Returns:
        The names of all K clients, also of those of which nothing is left, and for each the places in ``kept`` of what is
        its own: K disjoint, sorted index arrays that hold every example.

    Raises:
        UnusableFileError: If a client has no name that can be used.
    """
    names = client_order(owners)
    numbers = {name: number for number, name in enumerate(names)}
    holders = np.array([numbers[owners[index]] for index in kept], dtype=np.int64)
    order = np.argsort(holders, kind="stable")
    sizes = np.bincount(holders, minlength=len(names))
    return names, np.split(order.astype(np.int64), np.cumsum(sizes)[:-1])


def shown_name(name: str) -> str:
    """Return a client's name for a line about it, shortened where it is long; a number as it is.

    Example:
        >>> shown_name("3"), shown_name("hospital A"), len(shown_name(100 * "x"))
        ('3', "'hospital A'", 42)
    """
    if name.isascii() and name.isdecimal():
        return name
    return repr(name if len(name) <= SHOWN_NAME else name[: SHOWN_NAME - 1] + "…")


def shown_client(client: int, names: Sequence[str]) -> str:
    """Return what a line calls a client: its name, or its number where it has none."""
    return shown_name(names[client]) if client < len(names) else str(client)
