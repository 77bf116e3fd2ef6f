"""Load data sets by name: images and tables."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedamm_pl.data.sources.image_data import ImageData, ImageInfo
from fedamm_pl.data.sources.image_folder import read_image_folder
from fedamm_pl.data.sources.in_memory import (
    CLASS_NAMES,
    DOWNLOADABLE,
    NORMALIZATION,
    SHIPPED,
    read_shipped,
    read_torchvision,
)
from fedamm_pl.data.sources.list_file import read_list
from fedamm_pl.data.sources.npz import read_npz
from fedamm_pl.data.sources.options import ReadOptions, say_unused_share
from fedamm_pl.data.sources.own_data import image_data
from fedamm_pl.data.sources.reading import one_line
from fedamm_pl.data.sources.saved_datasets import is_saved_dataset, read_saved_dataset
from fedamm_pl.data.sources.tables import ROLES, SUFFIXES, read_table

__all__ = [
    "NORMALIZATION",
    "ImageData",
    "ImageInfo",
    "ReadOptions",
    "image_data",
    "load_images",
    "read_image_folder",
    "read_npz",
]

LIST = ".txt"
OF_FILES = ["image_size", "in_memory"]
"""Options of images in files."""

log = logging.getLogger(__name__)


def load_images(dataset: str, root: str | Path, options: ReadOptions | None = None) -> ImageData:
    """Load a data set by name.

    A name that ends in .csv, .tsv or .parquet refers to a table in ``root``, and one that ends in .txt to a list of
    images. For other names, the first of these that exists is used: ``fashion_mnist_mini`` and ``digits`` from the
    package; ``<root>/<dataset>.npz`` (or ``<root>/<dataset>`` if the name ends in .npz) with Keras or MedMNIST keys;
    the folder ``<root>/<dataset>`` or, for ``dataset="image_folder"``, ``<root>`` itself, with images (see
    :func:`read_image_folder`) or written by Hugging Face's ``save_to_disk``; torchvision's files under ``root``,
    downloaded on first use.

    Args:
        dataset: ``cifar10``, ``cifar100``, ``fashion_mnist``, ``fashion_mnist_mini``, ``digits``, ``image_folder``, or
            the name of an npz file, folder, list or table in ``root``.
        root: The folder of the data; a leading ``~`` stands for the user's home directory. Environment variables are
            not replaced.
        options: Options for reading the data.

    Returns:
        The examples.

    Raises:
        ValueError: If nothing with this name is found or can be downloaded, a file cannot be used, or an option is
            given that does not apply to this kind of data.
    """
    if not dataset or not str(root):
        raise ValueError(f"Expected `dataset` and `root` to be names, got {dataset!r} and {str(root)!r}.")
    options = options or ReadOptions()
    if dataset in SHIPPED:
        _require_used(options, dataset, [])
        say_unused_share(options.test_fraction, dataset)
        if os.path.exists(own := os.path.join(root, f"{dataset}.npz")):
            log.warning("%s of the package is read; %s is not: give it another name", dataset, own)
        return read_shipped(dataset)
    found = _look_for(dataset, root)
    kind = _kind(found)
    used = {
        "table": [*ROLES, *(OF_FILES if options.path_column else [])],
        "saved": [*OF_FILES, "label_column", "client_column"],
        **dict.fromkeys(("list", "folder"), OF_FILES),
    }
    _require_used(options, dataset, used.get(kind, []))
    if kind not in used:
        say_unused_share(options.test_fraction, dataset)
    match kind:
        case "table":
            return read_table(found.place, found.root, options)
        case "npz":
            return read_npz(found.npz, CLASS_NAMES.get(dataset))
        case "list":
            return read_list(found.place, found.root, options)
        case "saved":
            return read_saved_dataset(found.place, options)
        case "folder":
            return read_image_folder(found.place, options)
    return read_torchvision(dataset, found.root)


@dataclass(frozen=True)
class _Found:
    """The files and folders found under a name.

    Attributes:
        dataset: The name.
        root: The folder to look in.
        place: Path of a file or folder with this name.
        npz: Path of an npz file with this name.
        is_there: Whether ``place`` exists.
        has_npz: Whether ``npz`` exists.
        is_saved: Whether ``place`` is a folder written by ``save_to_disk``.
        has_images: Whether ``place`` is a folder of images.
        tables: Names of existing tables that consist of this name and a suffix.
    """

    dataset: str
    root: Path
    place: Path
    npz: Path
    is_there: bool
    has_npz: bool
    is_saved: bool
    has_images: bool
    tables: list[str]


def _look_for(dataset: str, root: str | Path) -> _Found:
    try:
        if "\0" in f"{dataset}{root}":
            raise ValueError("no name may have a null character")
        folder = Path(root).expanduser()
        npz = folder / (dataset if dataset.endswith(".npz") else f"{dataset}.npz")
        place = folder if dataset == "image_folder" else folder / dataset
        # a folder with the name of a download may be torchvision's
        has_images = (place / "train").is_dir() or (place.is_dir() and dataset not in DOWNLOADABLE)
        tables = [f"{dataset}{suffix}" for suffix in SUFFIXES if Path(f"{place}{suffix}").exists()]
        there = place.exists(), npz.exists(), is_saved_dataset(place), has_images
    except (OSError, ValueError, RuntimeError) as error:  # too long, an invalid character, an unknown user
        raise ValueError(
            f"Expected `dataset` and `root` to be names of files, got {dataset!r:.60} in {str(root)!r:.60} "
            f"({one_line(error):.200})."
        ) from error
    return _Found(dataset, folder, place, npz, *there, tables)


def _kind(found: _Found) -> str:
    """Return the kind of the data that are read: table, npz, list, saved, folder or download."""
    dataset, place, folder = found.dataset, found.place, found.root
    variables = " (variables such as $HOME are not replaced)" if "$" in str(folder) else ""
    is_table, is_list = dataset.lower().endswith(SUFFIXES), dataset.lower().endswith(LIST)
    if (is_table or is_list) and not found.is_there and not found.has_npz:
        kind = "table" if is_table else "list"
        hint = ""
        if (given := Path(dataset).expanduser()).is_file():  # relative to the working directory
            hint = f": for {given}, give `dataset` {given.name} and `root` {given.parent}"
        raise ValueError(f"Expected `root` to hold the {kind} {place}, got no such file{variables}{hint or '.'}")
    if is_table:
        return "table"
    if found.has_npz:
        if found.is_saved or found.has_images:
            log.warning("%s is read; the folder %s is not", found.npz, place)
        return "npz"
    if is_list and not found.has_images:
        return "list"
    if found.is_saved or found.has_images:
        return "saved" if found.is_saved else "folder"
    if dataset in DOWNLOADABLE:
        return "download"
    meant = [*found.tables, *([f"`root` {folder.parent}"] if folder.name == dataset and folder.is_dir() else [])]
    raise ValueError(
        f"Expected `dataset` to be one of {', '.join([*DOWNLOADABLE, *SHIPPED])}, the name of a table or list "
        f"({', '.join([*SUFFIXES, LIST])}), or `root` to hold {found.npz} or {place}/<class>/*.png, got {dataset!r} and no such "
        f"file{variables}{f'; did you mean {meant[0]}?' if meant else '.'}"
    )


def _require_used(options: ReadOptions, dataset: str, used: Sequence[str]) -> None:
    """Raise an error for options that do not apply to this kind of data."""
    given = [name for name in (*ROLES, *OF_FILES) if getattr(options, name) != getattr(ReadOptions(), name)]
    if options.in_memory:  # other data are always in memory
        given = [name for name in given if name != "in_memory"]
    if columns := [name for name in given if name in ROLES and name not in used]:
        raise ValueError(
            f"Expected {', '.join(columns)} to be given only for a table ({', '.join(SUFFIXES)}), got {dataset!r}."
        )
    if others := [name for name in given if name not in used]:
        raise ValueError(f"Expected {', '.join(others)} to be given only for images in files, got {dataset!r}.")
