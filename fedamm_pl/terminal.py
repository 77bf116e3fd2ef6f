"""What the program says: in characters that only show, and to whom is still there to read it."""

import contextlib
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what moves a cursor, turns the direction of writing, breaks lines, or is not seen."""

MAX_LINE = 300
"""Characters of a line about a client."""
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""With these a spreadsheet begins a formula, also where they are as wide as Chinese characters."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters as codes; it may come from a file or from a client.

    Args:
        text: The text.
        keep: Characters to leave as they are.

    Example:
        >>> print(printable("a\x1b[2J\n\u202eb"))
        a\x1b[2J\n\u202eb
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in HIDDEN and character not in keep
        else character
        for character in text
    )


def line(text: str, most: int = MAX_LINE) -> str:
    r"""Return the beginning of a text as one line in characters that only show.

    Args:
        text: The text.
        most: How many characters it may have.

    Example:
        >>> print(line("all\n is \x1b[1mwell" + 99 * "!", 20))
        all is \x1b[1mwell!!
    """
    return printable(" ".join(text[: 10 * most].split()))[:most]


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text, at once. Who reads it may have gone: then nothing more is printed, and the program goes on.

    Args:
        text: One or more lines; control characters in it are shown as codes.
        stream: Where to; by default the standard output.
    """
    target = sys.stdout if stream is None else stream
    try:
        print(printable(text, keep="\n"), file=target, flush=True)
    except (OSError, ValueError):  # a broken pipe, a closed terminal, a closed stream
        silence(target)


def silence(stream: TextIO) -> None:
    """Let what is written to a stream from here on go nowhere, also what it still holds when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def prepare_streams() -> None:
    """See that there is a standard output and a standard error, which show what they cannot encode as codes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program has begun
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PlainFormatter(logging.Formatter):
    """Formats a record as one line of characters that only show."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback, which the package does not log, keeps its lines."""
        return printable(super().format(record), keep="\n" if record.exc_info else "")


@contextlib.contextmanager
def plain_log() -> Iterator[None]:
    """Print what the package logs to the standard error, a line each."""
    logger, handler = logging.getLogger("fedamm_pl"), logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def as_csv(value: Any) -> Any:
    """Return a value as a field of a CSV file; a text that a spreadsheet would take for a formula gets a quote before it.

    Example:
        >>> as_csv("=SUM(A1)"), as_csv("FedAvg"), as_csv(-1.5)
        ("'=SUM(A1)", 'FedAvg', -1.5)
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    text = printable(str(value))
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
