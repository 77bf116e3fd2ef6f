"""Tables with one row per example: features or the path of an image, a label, and optionally a client and a part."""

import logging
import os
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import torch

from fedamm_pl.data.sources.decoded import kept_parts
from fedamm_pl.data.sources.image_data import ImageData
from fedamm_pl.data.sources.image_files import open_images
from fedamm_pl.data.sources.listed import Listed, data_set
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError, some
from fedamm_pl.data.sources.source import Source
from fedamm_pl.data.sources.table_files import DELIMITERS, Choose, NotANumberError, Rows, is_number, read_rows
from fedamm_pl.hints import similar
from fedamm_pl.terminal import printable

SUFFIXES = (*DELIMITERS, ".parquet")
INDEX = re.compile(r"|Unnamed: [0-9]+|__index_level_[0-9]+__")
"""Names under which pandas writes the numbers of rows to CSV and Parquet files, and reads them from CSV files."""
ROLES = [field.name for field in fields(ReadOptions) if field.name.endswith("_column")]
log = logging.getLogger(__name__)


def read_table(path: Path, root: Path, options: ReadOptions) -> ImageData:
    """Read a table: a CSV file (.csv with commas, .tsv with tabs), or a Parquet file, which requires pyarrow.

    Labels, clients, splits and paths are read as texts. All other columns are features and must be numbers; with a
    ``path_column`` they are not used, and each example is the image at its path below ``root``.

    ``split_column`` gives the rows for training, validation and testing. Without it, files beside the table are its
    other parts: ``test.csv`` and ``val.csv`` beside ``train.csv``, ``x_test.csv`` and ``x_val.csv`` beside ``x.csv`` or
    ``x_train.csv``. If there are no test examples, a share of each class is held out; see
    :func:`~fedamm_pl.data.sources.listed.data_set`, which also numbers the classes.

    Args:
        path: The file.
        root: The folder of the images.
        options: The columns and their roles, and the share that is held out.

    Returns:
        The examples: float32 features (N, D), or images.

    Raises:
        ValueError: If a file cannot be used, lacks a column or has it twice, or a cell does not fit its column. The
            message names file, row and column.
    """
    roles = {role: name for role in ROLES if (name := getattr(options, role))}
    if len(set(roles.values())) < len(roles) or "label_column" not in roles:
        raise ValueError(
            f"Expected label_column to be given, and {', '.join(ROLES[1:])} to be other columns, got {roles}."
        )
    files, beside = {"train": path}, _beside(path)
    if options.split_column and beside:
        log.warning("%s has its own split; %s are not read", path, some([str(file) for file in beside.values()]))
    else:
        files |= beside
    header = _Header(roles)
    try:
        tables = {part: read_rows(file, header.chooser(file)) for part, file in files.items()}
    except NotANumberError as error:
        if options.client_column or not error.words:
            raise
        column = " or ".join(error.words[:3])
        raise UnusableFileError(f"{str(error)[:-1]}; for its clients: `client_column` {column}.") from error
    _say_used(tables, files, header)
    rows = tables["train"] if len(tables) == 1 else _joined(tables, files)
    parts = rows.texts.get(options.split_column)
    if len(tables) > 1:
        parts = [part for part, table in tables.items() for _ in range(len(table.numbers))]
    del tables  # their content has been copied
    examples: Source = rows.numbers
    if options.path_column:
        paths = _below(root, rows.texts[options.path_column], rows, path)
        examples = open_images(paths, root=Path(os.path.abspath(root)), options=options)
    clients = rows.texts.get(options.client_column)
    listed = Listed(examples, rows.texts[options.label_column], parts, clients, str(path), rows.place)
    data = data_set(listed, options.test_fraction, options.seed)
    return kept_parts(replace(data, feature_names=header.features or None), options)


def _beside(path: Path) -> dict[str, Path]:
    """Return the files beside a table that contain its other parts."""
    written, first = path.stem[-5:], path.stem[:-5]
    if written not in ("train", "Train", "TRAIN"):
        written, first = "train", f"{path.stem}_"
    names = {part: {"train": part, "Train": part.title(), "TRAIN": part.upper()}[written] for part in ("test", "val")}
    files = {part: path.with_name(f"{first}{name}{path.suffix}") for part, name in names.items()}
    return {part: file for part, file in files.items() if file != path and os.path.lexists(file)}


class _Header:
    """The columns that are read: those of the first file, which the other files must have, too.

    Args:
        roles: Option -> name of its column.
    """

    def __init__(self, roles: dict[str, str]) -> None:
        self.roles = roles
        self.names: list[str] = []

    @property
    def others(self) -> list[str]:
        """Columns without a role."""
        return [name for name in self.names if name not in self.roles.values()]

    @property
    def features(self) -> list[str]:
        """Columns that are read as numeric features."""
        return [] if "path_column" in self.roles else self.others

    def chooser(self, path: Path) -> Choose:
        """Return a function that chooses the columns of a file to read as texts and those to read as numbers."""

        def choose(names: list[str]) -> tuple[list[str], list[str]]:
            if doubled := [name for name, count in Counter(names).items() if count > 1]:
                raise UnusableFileError(
                    f"Expected each column of {path} to have a name of its own, got {some(doubled)} twice."
                )
            if not self.names:
                self._require_roles(names, path)
                self.names = names
            # clients are needed for training only
            missing = set(self.names) - set(names) - {self.roles.get("client_column")}
            more = set(names) - set(self.names)
            if missing or more:
                got = f"got none called {some(sorted(missing))}" if missing else f"got {some(sorted(more))} too"
                raise UnusableFileError(f"Expected {path} to have the columns of the training table, {got}.")
            return [name for name in self.roles.values() if name in names], self.features

        return choose

    def _require_roles(self, names: list[str], path: Path) -> None:
        # the label is often the last column
        shown = some(names, 10) if len(names) <= 10 else f"{some(names)}, {names[-1]}"
        numeric = [name for name in names if is_number(name)]
        for role, name in self.roles.items():
            if name not in names:
                meant = similar(name, names)
                hint = f"; did you mean {meant!r}?" if meant else "."
                if numeric:
                    hint = ": the first line of a table must name its columns."
                raise UnusableFileError(
                    f"Expected `{role}` to be a column of {path}, got {name!r}; its columns are {shown}{hint}"
                )
        # tables without column names are often written with the numbers from 0 as names
        if len(numeric) == len(names) and names != [str(i) for i in range(len(names))]:
            raise UnusableFileError(f"Expected {path} to name its columns in its first line, got numbers: {shown}.")
        index = next((name for name in names if INDEX.fullmatch(name) and name not in self.roles.values()), None)
        if index is not None and "path_column" not in self.roles:
            got = f"a column {index!r}, under" if index else "a column without a name, as"
            raise UnusableFileError(
                f"Expected each feature of {path} to have a name, got {got} which pandas writes the numbers of rows; they may "
                "reveal the classes: save the table with index=False, or name the column."
            )
        if len(names) == len(self.roles) and "path_column" not in self.roles:
            raise UnusableFileError(
                f"Expected {path} to have columns of features, or a `path_column`, got {shown} alone."
            )


def _joined(tables: dict[str, Rows], files: dict[str, Path]) -> Rows:
    """Return the rows of several files, concatenated."""
    texts: dict[str, list[str]] = {name: [] for name in tables["train"].texts}
    for table in tables.values():
        for name, cells in texts.items():
            cells += table.texts.get(name, [""] * len(table.numbers))
    sizes, places, names = zip(
        *((len(table.numbers), table.place, files[part].name) for part, table in tables.items()), strict=True
    )
    starts = [0, *accumulate(sizes)]

    def place(row: int) -> str:
        which = bisect_right(starts, row) - 1
        return f"{places[which](row - starts[which])} of {names[which]}"

    return Rows(texts, torch.cat([table.numbers for table in tables.values()]), place)


def _say_used(tables: dict[str, Rows], files: dict[str, Path], header: _Header) -> None:
    """Log which columns are used, and warn about features that are likely to be something else."""
    train, path = tables["train"].numbers, files["train"]
    used = f"{len(header.features)} features: {some(header.features)}"
    if "path_column" in header.roles:
        others = f"; {len(header.others)} other columns are not used: {some(header.others)}" if header.others else ""
        used = f"images by the column {header.roles['path_column']}{others}"
    beside = "".join(f"; {file.name} is its {part} part" for part, file in files.items() if file != path)
    log.info("%s", printable(f"{path}: {len(train)} rows, {used}{beside}"))
    least, most = train.aminmax(dim=0)
    step, extent = torch.maximum(least.abs(), most.abs()) * 2**-23, most.double() - least
    # a constant with few digits is a true constant; with more digits, different numbers may have been rounded to it
    coarse = (step > 0.01 * extent) & ((extent > 0) | (step >= 2))
    for i, name in enumerate(header.features):
        column, role = train[:, i], f"{name.strip().lower()}_column"
        if role in ROLES and role not in header.roles:
            log.warning(
                "%s", printable(f"{path}: the column {name!r} is a feature; if it is not, set --data.{role} {name}")
            )
        elif len(column) > 2 and column[0] in (0, 1) and (column.diff() == 1).all():
            log.warning(
                "%s",
                printable(f"{path}: the feature {name!r} counts the rows, which may reveal their classes: remove it"),
            )
        elif coarse[i]:
            log.warning(
                "%s",
                printable(
                    f"{path}: the feature {name!r} varies so little relative to its size, around {most[i]:g}, that float32, which keeps "
                    "seven digits, hardly tells its values apart: subtract its smallest value first"
                ),
            )
        elif len(column) > 2 and (column == column.round()).all() and (column.diff() > 0).all():
            log.warning(
                "%s",
                printable(
                    f"{path}: the feature {name!r} rises from each row to the next, as numbers of rows do, which may reveal their "
                    "classes: remove it if it is no measurement"
                ),
            )


def _below(root: Path, names: list[str], rows: Rows, where: Path) -> list[str]:
    """Return the absolute paths of images, and check that all are below a folder and none occurs twice."""
    top = os.path.abspath(root)
    places = [os.path.abspath(os.path.join(top, name)) for name in names]
    start = os.path.join(top, "")
    if (bad := next((i for i, place in enumerate(places) if not place.startswith(start)), -1)) >= 0:
        raise UnusableFileError(
            f"Expected paths in {where} to lie below {top}, got {names[bad]!r} in {rows.place(bad)}."
        )
    first: dict[str, int] = {}
    if (bad := next((i for i, place in enumerate(places) if first.setdefault(place, i) != i), -1)) >= 0:
        raise UnusableFileError(  # one could be used for training, the other for testing
            f"Expected each image to be in {where} once, got {names[bad]!r} in {rows.place(first[places[bad]])} and in "
            f"{rows.place(bad)}."
        )
    return places
