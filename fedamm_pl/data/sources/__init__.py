"""Data sets by name: images and tables."""

import logging
from pathlib import Path

from fedamm_pl.data.sources.image_data import ImageData, ImageInfo, image_data
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
from fedamm_pl.data.sources.options import ReadOptions
from fedamm_pl.data.sources.reading import one_line
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

log = logging.getLogger(__name__)


def load_images(dataset: str, root: str | Path, options: ReadOptions | None = None) -> ImageData:
    """Load a data set by name.

    A name that ends in .csv, .tsv or .parquet is that of a table in ``root``, one that ends in .txt that of a list of images. Of
    other names, the first that exists is taken: ``fashion_mnist_mini`` from the package; ``<root>/<dataset>.npz`` (or
    ``<root>/<dataset>`` where that ends so) with Keras or MedMNIST keys; the folder ``<root>/<dataset>`` or, for
    ``dataset="image_folder"``, ``<root>`` itself, see :func:`read_image_folder`; torchvision's files under ``root``, downloaded
    on first use.

    Args:
        dataset: ``cifar10``, ``cifar100``, ``fashion_mnist``, ``fashion_mnist_mini``, ``image_folder``, or the name of
            an npz file, folder or table in ``root``.
        root: The folder that holds the data; a leading ``~`` is the home of the user. Environment variables are left as they are.
        options: How it is read.

    Returns:
        The examples.

    Raises:
        ValueError: If nothing of that name is found or can be downloaded, a file cannot be used, or columns are named of what
            is no table.
    """
    if not dataset or not str(root):
        raise ValueError(f"Expected `dataset` and `root` to be names, got {dataset!r} and {str(root)!r}.")
    options = options or ReadOptions()
    is_table = dataset.lower().endswith(SUFFIXES)
    if not is_table and (named := [role for role in ROLES if getattr(options, role) != getattr(ReadOptions(), role)]):
        raise ValueError(
            f"Expected {', '.join(named)} to be given for a table alone ({', '.join(SUFFIXES)}), got {dataset!r}."
        )
    if dataset == SHIPPED:
        return read_shipped()
    try:
        if "\0" in f"{dataset}{root}":
            raise ValueError("no name may have a null character")
        folder = Path(root).expanduser()
        npz = folder / (dataset if dataset.endswith(".npz") else f"{dataset}.npz")
        images = folder if dataset == "image_folder" else folder / dataset
        has_npz, has_images = npz.exists(), (images / "train").is_dir()
        has_images |= images.is_dir() and dataset not in DOWNLOADABLE  # where torchvision may have put its files
        is_there, tables = (
            images.exists(),
            [f"{dataset}{suffix}" for suffix in SUFFIXES if Path(f"{images}{suffix}").exists()],
        )
    except (OSError, ValueError, RuntimeError) as error:  # too long, a character that no name may have, an unknown user
        raise ValueError(
            f"Expected `dataset` and `root` to be names of files, got {dataset!r:.60} in {str(root)!r:.60} "
            f"({one_line(error):.200})."
        ) from error
    variables = " (variables such as $HOME are not replaced)" if "$" in str(root) else ""
    if is_table:
        if not is_there:
            raise ValueError(f"Expected `root` to hold the table {images}, got no such file{variables}.")
        return read_table(images, folder, options)
    if dataset.lower().endswith(LIST) and is_there and not has_images:
        return read_list(images, folder, options)
    if has_npz and has_images:
        log.warning("%s is read; the folder %s is not", npz, images)
    if has_npz:
        return read_npz(npz, CLASS_NAMES.get(dataset))
    if has_images:
        return read_image_folder(images, options)
    if dataset in DOWNLOADABLE:
        return read_torchvision(dataset, folder)
    meant = f"; did you mean {tables[0]}?" if tables else "."
    raise ValueError(
        f"Expected `dataset` to be one of {', '.join([*DOWNLOADABLE, SHIPPED])}, the name of a table or list "
        f"({', '.join([*SUFFIXES, LIST])}), or `root` to hold {npz} or {images}/<class>/*.png, got {dataset!r} and no such file{variables}{meant}"
    )
