"""Output of the program: only printable characters, and no errors if the reader has closed the stream."""

import contextlib
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that move the cursor, change the text direction, break lines, or are invisible."""

MAX_LINE = 300
"""Maximum number of characters in a line about a client."""
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""Characters with which a formula in a spreadsheet may begin, including their full-width forms."""


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters as escape codes; the text may come from a file or from a client.

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
    r"""Return the beginning of a text as one line of printable characters.

    Args:
        text: The text.
        most: Maximum number of characters.

    Example:
        >>> print(line("all\n is \x1b[1mwell" + 99 * "!", 20))
        all is \x1b[1mwell!!
    """
    return printable(" ".join(text[: 10 * most].split()))[:most]


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text and flush it. If the stream is closed, nothing more is printed and the program continues.

    Args:
        text: One or more lines; control characters are shown as escape codes.
        stream: Where to print; by default to the standard output.
    """
    target = sys.stdout if stream is None else stream
    try:
        print(printable(text, keep="\n"), file=target, flush=True)
    except (OSError, ValueError):  # a broken pipe, a closed terminal, a closed stream
        silence(target)


def silence(stream: TextIO) -> None:
    """Discard all further output of a stream, including what its buffer still holds when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def prepare_streams() -> None:
    """Ensure that standard output and standard error exist, and write characters that they cannot encode as codes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PlainFormatter(logging.Formatter):
    """Formats a record as one line of printable characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback (the package logs none) keeps its line breaks."""
        return printable(super().format(record), keep="\n" if record.exc_info else "")


@contextlib.contextmanager
def plain_log() -> Iterator[None]:
    """Print the log messages of the package to the standard error, one line each."""
    logger, handler = logging.getLogger("fedamm_pl"), logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def as_csv(value: Any) -> Any:
    """Return a value as a field of a CSV file; a text that a spreadsheet would take for a formula gets a leading quote.

    Example:
        >>> as_csv("=SUM(A1)"), as_csv("FedAvg"), as_csv(-1.5)
        ("'=SUM(A1)", 'FedAvg', -1.5)
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    text = printable(str(value))
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
