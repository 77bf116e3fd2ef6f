"""Image data sets as uint8 tensors in memory, by name."""

from pathlib import Path

from fedamm_pl.data.sources.image_files import read_image_folder
from fedamm_pl.data.sources.in_memory import (
    CLASS_NAMES,
    DOWNLOADABLE,
    NORMALIZATION,
    SHIPPED,
    ImageData,
    ImageInfo,
    check_images,
    read_npz,
    read_shipped,
    read_torchvision,
)

__all__ = ["NORMALIZATION", "ImageData", "ImageInfo", "check_images", "load_images", "read_image_folder", "read_npz"]


def load_images(dataset: str, root: str | Path) -> ImageData:
    """Load a data set by name.

    The first that exists is taken: ``fashion_mnist_mini`` from the package; ``<root>/<dataset>.npz`` with Keras or
    MedMNIST keys; the folder ``<root>/<dataset>`` or, for ``dataset="image_folder"``, ``<root>`` itself, with
    ``{train,test}/<class>/*.png``; torchvision's files under ``root``, downloaded on first use.

    Args:
        dataset: ``cifar10``, ``cifar100``, ``fashion_mnist``, ``fashion_mnist_mini``, ``image_folder``, or the name of
            an npz file or folder in ``root``.
        root: The folder that holds the data.

    Returns:
        The images in memory.

    Raises:
        ValueError: If nothing of that name is found or can be downloaded, or a file cannot be used.
    """
    root = Path(root)
    if dataset == SHIPPED:
        return read_shipped()
    npz, folder = root / f"{dataset}.npz", root if dataset == "image_folder" else root / dataset
    try:
        has_npz, has_folder = npz.exists(), (folder / "train").is_dir()
    except (OSError, ValueError) as error:  # too long, or with a character that no name may have
        raise ValueError(
            f"Expected `dataset` and `root` to be names of files, got {dataset!r:.60} ({error})."
        ) from error
    if has_npz:
        return read_npz(npz, CLASS_NAMES.get(dataset))
    if has_folder:
        return read_image_folder(folder)
    if dataset in DOWNLOADABLE:
        return read_torchvision(dataset, root)
    raise ValueError(
        f"Expected `dataset` to be one of {', '.join([*DOWNLOADABLE, SHIPPED])}, or `root` to hold {npz} or "
        f"{folder}/train/<class>/*.png, got {dataset!r} and no such file."
    )
