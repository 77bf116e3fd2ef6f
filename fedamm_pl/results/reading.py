"""Readers for the files in a run's folder, which may come from an unknown source: size and content are checked."""

import csv
import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fedamm_pl.federation.contents import MAX_COLUMNS
from fedamm_pl.federation.fingerprint import flatten
from fedamm_pl.files import NO_FOLLOW
from fedamm_pl.kinds import parse_json
from fedamm_pl.results.content import check_diagnostics, check_history, check_options, check_summary

TUNING = "tuning"
"""Folder of the tuning runs in the folder of a comparison."""
METRICS = "metrics.csv"
MAX_BYTES = {METRICS: 64_000_000, "config.yaml": 200_000, "summary.json": 32_000_000, "diagnostics.json": 64_000_000}
"""Largest size of each file in bytes, more than a run needs; it bounds the memory that an unknown file can take."""
MAX_TABLE = 16_000_000
"""Largest size in bytes of a comparison's table, which is not in the folder of a run."""
MAX_CELLS = 4_000_000
"""Largest number of values in metrics.csv."""
MAX_DEPTH, MAX_INTEGER = 30, 10**400
"""Deepest nesting and largest integer in a configuration; beyond these it could not be written out again."""
PATIENCE = 0.2
"""Seconds to wait until a row that is being written is complete."""


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read summary.json of a run; None if it is missing.

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    summary: dict[str, Any] | None = read(folder / "summary.json", _summary)
    return summary


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read config.yaml of a run; None if it is missing.

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    config: dict[str, Any] | None = read(folder / "config.yaml", _config)
    return config


def read_diagnostics(folder: Path) -> dict[str, Any] | None:
    """Read diagnostics.json of a run; None if it is missing.

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    diagnostics: dict[str, Any] | None = read(folder / "diagnostics.json", _diagnostics)
    return diagnostics


def read_history(folder: Path) -> list[dict[str, float]] | None:
    """Read metrics.csv of a run, a row for each evaluated round; None if it is missing.

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    rows: list[dict[str, float]] | None = read(folder / METRICS, _rows)
    return rows


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """Read and parse a file of a run; None if it is missing.

    The folder may come from an unknown source. Links, pipes and files that are too large are refused: a link could lead
    out of the folder, reading a pipe could block, and a huge file could fill the memory.

    Args:
        path: The file.
        parse: Text of the file -> its content.

    Raises:
        ValueError: If the file is not a regular one, or cannot be read; the message names it in one line.
    """
    try:
        text = _text(path)
        if path.name == METRICS and text and not text.endswith("\n"):
            time.sleep(PATIENCE)
            text = _text(path)
        return parse(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # malformed YAML may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"Expected {path} to be as a run has written it, got a file that cannot be read: {reason:.300}"
        ) from error


def _text(path: Path) -> str:
    kind = path.lstat().st_mode
    if not stat.S_ISREG(kind):
        raise ValueError("it is a link" if stat.S_ISLNK(kind) else "it is not a regular file")
    # the file may have been replaced since the check; with these flags no link is followed and no pipe blocks
    most = MAX_BYTES.get(path.name, MAX_TABLE)
    with open(os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8")


def _rows(text: str) -> list[dict[str, float]]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = next(lines, [])
    if len(columns) > MAX_COLUMNS or len(columns) * text.count("\n") > MAX_CELLS:
        raise ValueError(f"it has more values than a run: {len(columns):,} columns in {text.count(chr(10)):,} lines")
    # an empty field is a metric that was not measured in the round; NaN is a measured value
    rows = [{name: float(value) for name, value in zip(columns, line, strict=True) if value} for line in lines if line]
    check_history(columns, rows)
    return rows


def _summary(text: str) -> dict[str, Any]:
    check_summary(content := parse_json(text))
    return dict(content)


def _diagnostics(text: str) -> dict[str, Any]:
    check_diagnostics(content := parse_json(text))
    return dict(content)


class PlainLoader(yaml.SafeLoader):
    """YAML loader that refuses aliases: no run writes them, and a few nested ones can expand beyond the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*), which no run writes")
        return super().compose_node(parent, index)


def _config(text: str) -> dict[str, Any]:
    content = yaml.load(text, PlainLoader)
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    _check_plain(content)
    check_options(flatten(content))
    return content


def _check_plain(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a name in it is not a text")
        if not isinstance(value.get("class_path", ""), str):
            raise ValueError("a class_path in it is not a text")
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_plain(part, depth + 1)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("a number in it is too large")
