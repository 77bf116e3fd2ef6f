"""Read rows of CSV and Parquet files: some columns as texts, the others as numbers."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.reading import UnusableFileError, one_line, reading, require_memory
from fedamm_pl.terminal import printable

BLOCK = 2**24
"""Number of bytes that are checked at once; lines must be shorter."""
CELLS_AT_ONCE = 2**13  # more do not fit into the caches and take twice the time
BYTES_PER_TEXT = 100
DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

Choose = Callable[[list[str]], tuple[list[str], list[str]]]
"""A function: columns of a file -> those to read as texts, and those to read as numbers."""


@dataclass(frozen=True)
class Rows:
    """The rows that have been read from a file.

    Attributes:
        texts: Column -> its cells, stripped of surrounding space.
        numbers: The requested numeric columns, float32, shape (N, D).
        place: Number of a row, from 0 -> its name in messages.
    """

    texts: dict[str, list[str]]
    numbers: Tensor
    place: Callable[[int], str]


def read_rows(path: Path, choose: Choose) -> Rows:
    """Read a CSV file (.csv with commas, .tsv with tabs; UTF-8, column names in the first line) or a Parquet file.

    Blank lines are skipped. Numbers must be written like 1, -2.5 or 3e-4; other notations are not accepted.

    Args:
        path: The file; its suffix determines its type.
        choose: Chooses the columns to read, and raises an error if they do not exist.

    Raises:
        ValueError: If the file is damaged, is another kind of text, has no rows or rows of different length, or does
            not fit into memory; or if a cell that should be a number is empty, something else, or beyond float32. The
            message names row, line and column.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    rows = _read_parquet(path, choose) if delimiter is None else _read_csv(path, delimiter, choose)
    if not len(rows.numbers):
        raise UnusableFileError(f"Expected {path} to hold rows, got only the names of columns.")
    return rows


def _read_csv(path: Path, delimiter: str, choose: Choose) -> Rows:
    with _opened(path, delimiter) as (lines, rows):
        if not (names := [name.strip() for name in next(rows, [])]):
            raise UnusableFileError(f"Expected {path} to hold a table, got an empty file.")
        other = next((other for other in NAMES if other != delimiter and other in names[0]), None)
        if len(names) == 1 and other:
            raise UnusableFileError(
                f"Expected {path} to have {NAMES[delimiter]} between its cells, got {NAMES[other]}: save it with "
                f"{NAMES[delimiter]} and with points in its numbers."
            )
        text_names, number_names = choose(names)
        # numbers are stored twice: here and in the parts of the data set
        needed = lines * (2 * 4 * len(number_names) + BYTES_PER_TEXT * len(text_names))
        require_memory(needed, f"the {lines - 1} rows of {path}")
        position = {name: i for i, name in enumerate(names)}
        where = [position[name] for name in number_names]
        numbers = np.empty((lines, len(where)), dtype=np.float32)
        texts: dict[str, list[str]] = {name: [] for name in text_names}
        once: dict[str, str] = {}  # most texts occur many times

        def place(row: int) -> str:
            return f"row {row + 1} (line {_line(path, delimiter, row)})"

        done, at_once = 0, max(1, CELLS_AT_ONCE // len(names))
        while chunk := list(islice(rows, at_once)):
            if {len(row) for row in chunk} != {len(names)}:
                bad = next(i for i, row in enumerate(chunk) if len(row) != len(names))
                raise UnusableFileError(
                    f"Expected each row of {path} to have {len(names)} cells, as its first line has, got {len(chunk[bad])} in "
                    f"{place(done + bad)}."
                )
            cells = np.array(chunk, dtype=object)
            for name, found in texts.items():
                stripped = [cell.strip() for cell in cells[:, position[name]]]
                found.extend(map(once.setdefault, stripped, stripped))
            numbers[done : done + len(chunk)] = _numbers(cells[:, where], number_names, path, done, place)
            done += len(chunk)
    return Rows(texts, torch.from_numpy(numbers[:done]), place)


@contextmanager
def _opened(path: Path, delimiter: str) -> Iterator[tuple[int, Iterator[list[str]]]]:
    """Open a CSV file; yield an upper bound of its number of lines, and its rows as cells, column names first."""
    expected = "a table as text, got a file that cannot be read"
    with reading(path, expected), path.open("rb") as file:
        lines = _count_lines(path, file)
        file.seek(0)
        rows = csv.reader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
            delimiter=delimiter,
            strict=True,
            skipinitialspace=True,
        )
        try:
            yield lines, filter(None, rows)
        except UnicodeDecodeError as error:
            raise UnusableFileError(
                f"Expected {path} to be in UTF-8, got the byte 0x{error.object[error.start]:02x} in line "
                f"{_undecodable_line(path)}: save it in UTF-8."
            ) from error
        except csv.Error as error:
            raise UnusableFileError(
                f"Expected {path} to hold rows of cells with {NAMES[delimiter]} between them, got line {rows.line_num} of "
                f"another form ({one_line(error)})."
            ) from error


def _count_lines(path: Path, file: BinaryIO) -> int:
    """Return an upper bound of the number of lines, and check for null characters and overlong lines."""
    feeds = returns = 0
    while block := file.read(BLOCK):
        if b"\0" in block:
            raise UnusableFileError(f"Expected {path} to be a table as text in UTF-8, got null characters in it.")
        feeds, returns, before = feeds + block.count(b"\n"), returns + block.count(b"\r"), feeds + returns
        if feeds + returns == before and len(block) == BLOCK:
            raise UnusableFileError(f"Expected lines of {path} to be shorter than {BLOCK} bytes, got a longer one.")
    return max(feeds, returns) + 1


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1  # a character is split by a line break


def _line(path: Path, delimiter: str, row: int) -> int:
    """Return the last line, counted from 1, of a row, counted from 0 without the names of the columns."""
    with path.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
        next(islice(filter(None, rows), row + 1, None))
        return rows.line_num


def _numbers(
    cells: npt.NDArray[np.object_], names: list[str], path: Path, first_row: int, place: Callable[[int], str]
) -> npt.NDArray[np.float32]:
    """Convert texts (n, D) to numbers; ``first_row`` and ``place`` are used in messages."""
    flat: list[str] = cells.ravel().tolist()
    joined = "".join(flat)
    if joined.isascii() and "_" not in joined:  # Python accepts 1_000 and digits of all scripts as numbers
        try:
            with np.errstate(over="ignore"):
                values = cells.astype(np.float64).astype(np.float32)
        except ValueError:
            pass
        else:
            if np.isfinite(values).all():
                return values
    bad = next(i for i, cell in enumerate(flat) if not is_number(cell))
    words = [name for name, column in zip(names, cells.T, strict=True) if all(map(_is_word, column))]
    raise not_a_number(path, names[bad % len(names)], flat[bad], place(first_row + bad // len(names)), words)


def _is_word(cell: str) -> bool:
    return bool(cell.strip()) and not is_number(cell)


def is_number(text: str) -> bool:
    """Return whether a text is a finite number in common notation that float32 can represent."""
    try:
        with np.errstate(over="ignore"):
            return text.isascii() and "_" not in text and bool(np.isfinite(np.float32(float(text))))
    except ValueError:
        return False


class NotANumberError(UnusableFileError):
    """A cell is not a number.

    Args:
        message: The message.
        words: Columns that contain only words in the rows that have been checked.
    """

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = words


def not_a_number(path: Path, name: str, cell: str, place: str, words: Sequence[str] = ()) -> NotANumberError:
    """Return the error to raise for a cell that is not a number."""
    got = f"{cell!r:.40}" if cell.strip() else "an empty cell"
    return NotANumberError(
        f"Expected the column {name!r:.60} of {path} to hold finite numbers (float32), got {got} in {place}: fill or mend "
        "it, or leave the column out; labels, clients, splits and paths have options of their own.",
        words,
    )


def _read_parquet(path: Path, choose: Choose) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnusableFileError(
            f"Expected pyarrow to be installed, which reads {path}: pip install pyarrow, or save the table as .csv."
        ) from error
    expected = "a whole Parquet file, got one that cannot be read"
    with reading(path, expected), pq.ParquetFile(path, page_checksum_verification=True) as file:
        num_rows = file.metadata.num_rows
        text_names, number_names = choose(file.schema_arrow.names)
        needed = num_rows * (2 * 4 * len(number_names) + BYTES_PER_TEXT * len(text_names) + 16)
        require_memory(needed, f"the {num_rows} rows of {path}")

        def column(name: str) -> Any:
            return file.read(columns=[name]).column(name)

        texts = {name: _texts(column(name), name, path, pa) for name in text_names}
        numbers = np.empty((num_rows, len(number_names)), dtype=np.float32)
        for i, name in enumerate(number_names):
            numbers[:, i] = _column_of_numbers(column(name), name, path, pa)
    return Rows(texts, torch.from_numpy(numbers), _row)


def _row(row: int) -> str:
    return f"row {row + 1}"


def _texts(column: Any, name: str, path: Path, pa: Any) -> list[str]:
    try:
        cells = column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise UnusableFileError(
            f"Expected the column {name!r:.60} of {path} to hold texts or whole numbers, got {column.type}."
        ) from error
    if pa.types.is_floating(column.type):
        cells = ["" if cell == "nan" else cell for cell in cells]
    once: dict[str, str] = {"": ""}
    return [once.setdefault(cell, cell) for cell in ((cell or "").strip() for cell in cells)]


def _column_of_numbers(column: Any, name: str, path: Path, pa: Any) -> npt.NDArray[np.float32]:
    kind = column.type
    if not any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)):
        if not pa.types.is_boolean(kind):
            raise UnusableFileError(
                f"Expected the column {name!r:.60} of {path} to hold finite numbers (float32), got {printable(str(kind))}."
            )
        column = column.cast(pa.int8())
    cells = column.cast(pa.float64(), safe=False).to_numpy()  # an empty cell becomes NaN
    with np.errstate(over="ignore"):
        values: npt.NDArray[np.float32] = cells.astype(np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        cell = column[int(bad[0])].as_py()
        raise not_a_number(path, name, "" if cell is None else str(cell), _row(int(bad[0])))
    return values
