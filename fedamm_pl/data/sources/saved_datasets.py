"""Image data sets saved with ``save_to_disk`` of Hugging Face's package ``datasets``; only pyarrow is needed."""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedamm_pl.data.sources.decoded import DecodedImages, Form, kept_parts, read_headers
from fedamm_pl.data.sources.decoding import Content
from fedamm_pl.data.sources.image_data import ImageData, check_names
from fedamm_pl.data.sources.listed import PARTS, Listed, data_set
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import UnusableFileError, reading, reworded, some
from fedamm_pl.hints import similar
from fedamm_pl.terminal import printable

SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
MAX_BYTES = 2**24
"""Maximum size of a JSON file; for a data set with a thousand classes it has about 20 kB."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SavedImages(DecodedImages):
    """Images in Arrow files, decoded on demand; the files are mapped into memory, not read.

    Attributes:
        chunks: Arrow arrays of the images' bytes.
        starts: The first row of each chunk, followed by the number of rows.
        names: For messages about each chunk: the split, and the first row of the chunk in it.
    """

    chunks: Sequence[Any]
    starts: Sequence[int]
    names: Sequence[tuple[str, int]]

    @property
    def fingerprint(self) -> str:
        """A hash of the images' sizes in bytes and of their form; a replaced image of the same size is not detected."""
        sizes = [len(self.file(row).content) for row in self.rows.tolist()]
        digest = hashlib.sha256(f"{self.form.shape} {self.form.resized}".encode())
        digest.update(np.array(sizes, dtype="<i8").tobytes())
        return digest.hexdigest()

    def file(self, row: int) -> Content:
        """Return the bytes of an image."""
        which = bisect_right(self.starts, row) - 1
        value = self.chunks[which][row - self.starts[which]].as_buffer()
        if value is None:
            raise UnusableFileError(
                f"Expected {self.place(row)} to hold an image, got none, or a path to one elsewhere."
            )
        return Content(self.place(row), memoryview(value))

    def place(self, row: int) -> str:
        """Return the name of a row in messages."""
        which = bisect_right(self.starts, row) - 1
        name, start = self.names[which]
        return f"row {start + row - self.starts[which]} of {name}"


@dataclass(frozen=True)
class Split:
    """A saved split.

    Attributes:
        folder: Its folder.
        table: An Arrow table.
        image_column: The column of the images.
        class_names: Class names of the labels, if the data set has them.
    """

    folder: Path
    table: Any
    image_column: str
    class_names: list[str] | None


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder contains the files that ``save_to_disk`` writes."""
    return (folder / SPLITS).is_file() or ((folder / STATE).is_file() and (folder / INFO).is_file())


def read_saved_dataset(folder: Path, options: ReadOptions | None = None) -> ImageData:
    """Read images saved by ``datasets``: one split, or train and optionally validation and test splits.

    The images are those of the single column of type ``Image``, stored as bytes in the files; labels are class labels,
    whole numbers or texts. Rows whose class label is -1 (unknown) are left out, which is logged. Nothing is downloaded,
    and code that comes with the data is not run.

    Args:
        folder: The folder.
        options: ``label_column`` and ``client_column``, and options for reading images, see
            :func:`~fedamm_pl.data.sources.image_files.read_images`. Without a test split, a share is held out.

    Raises:
        ValueError: If pyarrow is not installed, a file is damaged, a column is missing or has another type, or an image
            cannot be used. The message names the folder, and the row from 0.
    """
    options = options or ReadOptions()
    pa = _pyarrow(folder)
    splits = {part: _read_split(place, options, part, pa) for part, place in _folders(folder).items()}
    names = splits["train"].class_names
    labels: list[int | str] = []
    with reworded(folder, "whole Arrow files of images, got others"):
        for split in splits.values():
            if split.class_names != names:
                raise UnusableFileError(f"Expected {split.folder} to have the same classes as the others, got others.")
            labels += _values(split, options.label_column, pa)
        images = _images(splits, folder, options, pa)
        holders = _clients(splits, options.client_column, pa)
    parts = [part for part, split in splits.items() for _ in range(split.table.num_rows)]
    rows = range(len(labels)) if names is None else _known(labels, len(names), images)
    stored = torch.tensor(rows, dtype=torch.int64)
    listed = Listed(
        images.subset(stored),
        [labels[row] for row in rows],
        [parts[row] for row in rows] if len(splits) > 1 else None,
        holders and [holders[row] for row in rows],
        str(folder),
        lambda i: images.place(rows[i]),
    )
    data = data_set(listed, options.test_fraction, options.seed)
    data = replace(data, rows={part: stored[mine] for part, mine in (data.rows or {}).items()})
    if names is not None:
        data = replace(data, class_names=[names[int(number)] for number in data.class_names])
        check_names(data.class_names, f" of {folder}")
    sizes = ", ".join(f"{len(labels)} images in {part}" for part, (_, labels) in data.parts.items())
    log.info("%s: %d classes, %s", folder, len(data.class_names), sizes)
    return kept_parts(data, options)


def _pyarrow(folder: Path) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UnusableFileError(
            f"Expected pyarrow to be installed, which reads {folder}: pip install pyarrow, or fedamm_pl[huggingface]."
        ) from error
    return pa


def _folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split: train, val, test."""
    if not (folder / SPLITS).is_file():
        return {"train": folder}
    names = _json(folder / SPLITS).get("splits")
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise UnusableFileError(f"Expected `splits` of {folder / SPLITS} to be a list of names of folders.")
    found: dict[str, str] = {}
    for name in names:
        if (part := PARTS.get(name.lower())) and found.setdefault(part, name) != name:
            raise UnusableFileError(f"Expected one {part} split in {folder}, got {found[part]} and {name}.")
    if "train" not in found:
        raise UnusableFileError(f"Expected {folder} to have a split called train, got {some(names)}.")
    if others := [printable(name) for name in names if name not in found.values()]:
        log.warning("%s: splits that are not used: %s", folder, some(others))
    return {part: folder / name for part, name in found.items()}


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _json(path: Path) -> dict[str, Any]:
    with reading(path, "a JSON object of a saved data set, got one that cannot be read"):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it is of type {type(content).__name__}")
    return content


def _read_split(folder: Path, options: ReadOptions, part: str, pa: Any) -> Split:
    kinds = _json(folder / INFO).get("features")
    kinds = kinds if isinstance(kinds, dict) else {}
    files = _json(folder / STATE).get("_data_files")
    named: list[Any] = (
        [each.get("filename") for each in files if isinstance(each, dict)] if isinstance(files, list) else []
    )
    if not named or not all(_is_name(name) for name in named) or len(set(named)) < len(named):
        raise UnusableFileError(f"Expected `_data_files` of {folder / STATE} to name the files beside it, each once.")
    image = [name for name, kind in kinds.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    if len(image) != 1:
        raise UnusableFileError(f"Expected {folder} to have one column of images, got {some(image) or 'none'}.")
    needed = [image[0], options.label_column, *([options.client_column] if part == "train" else [])]
    with reworded(folder, "whole Arrow files of one kind, got others"):
        table = pa.concat_tables([_read_table(folder / name, pa) for name in named])
        if missing := [name for name in needed if name and name not in table.column_names]:
            meant = similar(missing[0], table.column_names)
            raise UnusableFileError(
                f"Expected {missing[0]!r:.60} to be a column of {folder}; its columns are {some(table.column_names, 10)}"
                f"{f'; did you mean {meant!r}?' if meant else '.'}"
            )
        table = table.select(
            [name for name in dict.fromkeys([*needed, options.client_column]) if name in table.column_names]
        )
        table.validate(full=True)  # in a damaged or forged file, values may lie outside the file
    label = kinds.get(options.label_column)
    names = label.get("names") if isinstance(label, dict) and label.get("_type") == "ClassLabel" else None
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise UnusableFileError(f"Expected the class names of {folder / INFO} to be texts.")
    return Split(folder, table, image[0], names)


def _read_table(path: Path, pa: Any) -> Any:
    with reading(path, "a whole Arrow file, got one that cannot be read"):
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _values(split: Split, name: str, pa: Any) -> list[int | str]:
    column = split.table.column(name)
    if not (
        pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ):
        raise UnusableFileError(
            f"Expected the column {name!r:.60} of {split.folder} to hold whole numbers or texts, got {column.type}."
        )
    values: list[int | str] = column.to_pylist()
    if column.null_count:
        raise UnusableFileError(
            f"Expected every {name!r:.60} in {split.folder} to be given, got none in row {values.index(None)}."  # type: ignore[arg-type]
        )
    return values


def _clients(splits: dict[str, Split], name: str, pa: Any) -> list[str] | None:
    if not name:
        return None
    found: list[str] = []
    for split in splits.values():
        known = name in split.table.column_names  # clients are needed for training only
        found += map(str, _values(split, name, pa)) if known else [""] * split.table.num_rows
    return found


def _images(splits: dict[str, Split], folder: Path, options: ReadOptions, pa: Any) -> SavedImages:
    chunks: list[Any] = []
    places: list[tuple[str, int]] = []
    for split in splits.values():
        kind = split.table.schema.field(split.image_column).type
        stored = [field for field in kind if field.name == "bytes"] if pa.types.is_struct(kind) else []
        if not stored or not (pa.types.is_binary(stored[0].type) or pa.types.is_large_binary(stored[0].type)):
            raise UnusableFileError(f"Expected images of {split.folder} to be stored as bytes, got {kind}.")
        row = 0
        for chunk in split.table.column(split.image_column).chunks:
            chunks.append(chunk.field("bytes"))
            places.append((str(split.folder), row))
            row += len(chunk)
    starts = [0, *accumulate(len(chunk) for chunk in chunks)]
    empty = Form("L", (0, 0), False, "", 0, str(folder))
    images = SavedImages(torch.arange(starts[-1]), empty, chunks, starts, places)
    form, _, several = read_headers(len(images), images.file, options.image_size, str(folder))
    if several:
        log.warning("%s: images with further frames or pages, the first used: %d", folder, len(several))
    return replace(images, form=form)


def _known(labels: Sequence[int | str], number: int, images: SavedImages) -> list[int]:
    """Return the rows with a known class."""
    if (bad := next((row for row, label in enumerate(labels) if not -1 <= int(label) < number), None)) is not None:
        raise UnusableFileError(
            f"Expected labels to be in 0..{number - 1}, or -1 for none, got {labels[bad]} in {images.place(bad)}."
        )
    rows = [row for row, label in enumerate(labels) if label != -1]
    if len(rows) < len(labels):
        log.warning(
            "%s: %d of %d images have no label (-1) and are left out",
            images.form.where,
            len(labels) - len(rows),
            len(labels),
        )
    return rows
