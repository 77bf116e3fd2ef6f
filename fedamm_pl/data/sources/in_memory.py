"""Data sets with fixed names: those in the package, and those of torchvision."""

import errno
import os
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from fedamm_pl.data.sources.image_data import ImageData, image_tensor
from fedamm_pl.data.sources.npz import read_npz
from fedamm_pl.data.sources.reading import one_line

DOWNLOADABLE = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
}
SHIPPED = ("fashion_mnist_mini", "digits")
"""Data sets in the package: images, and a table of features."""
NORMALIZATION = {  # channel means and standard deviations of the training sets, as commonly published
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "fashion_mnist_mini": ((0.2860,), (0.3530,)),
}
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle_boot",
]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASS_NAMES = {"cifar10": CIFAR10_CLASSES, "fashion_mnist": FASHION_CLASSES, "fashion_mnist_mini": FASHION_CLASSES}


def read_shipped(dataset: str) -> ImageData:
    """Read one of the data sets in :data:`SHIPPED`."""
    with resources.as_file(resources.files("fedamm_pl.data") / dataset / f"{dataset}.npz") as path:
        return read_npz(path, CLASS_NAMES.get(dataset))


def read_torchvision(dataset: str, root: Path) -> ImageData:
    """Read a data set with torchvision, which downloads it if it is missing.

    Args:
        dataset: A key of ``DOWNLOADABLE``.
        root: The folder of torchvision's files.

    Returns:
        The images in memory.

    Raises:
        ValueError: If the data set is missing or incomplete and cannot be downloaded.
    """
    loader: Any = DOWNLOADABLE[dataset]
    places = (
        *reversed(root.parents),
        root,
        *(root / getattr(loader, "base_folder", loader.__name__) / part for part in ("", "raw")),
    )
    absent = [place for place in places if not os.path.exists(place)]
    try:
        try:
            train, test = (loader(root, train=part, download=False) for part in (True, False))
        except RuntimeError:  # missing or damaged
            train, test = (loader(root, train=part, download=True) for part in (True, False))
        return ImageData(
            image_tensor(np.asarray(train.data), "the training images"),
            torch.as_tensor(train.targets),
            image_tensor(np.asarray(test.data), "the test images"),
            torch.as_tensor(test.targets),
            CLASS_NAMES.get(dataset, list(train.classes)),
        )
    except Exception as error:  # no network, or damaged files, which may raise any error
        for place in reversed(absent):
            with suppress(OSError):  # it was not created, or is not empty
                place.rmdir()
        raise ValueError(
            f"Expected {dataset} under `root` = {root} or a network to download it, got {_found(loader, root, error)} "
            f"({one_line(error)}). Three ways: run once with network; copy torchvision's files of it into {root}; or put "
            f"{root / dataset}.npz there (x_train, y_train, x_test, y_test). The data sets {' and '.join(SHIPPED)} need none of them."
        ) from error


def _found(loader: Any, root: Path, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "too little memory for it"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "a folder that may not be read or written"
    folder = root / getattr(loader, "base_folder", loader.__name__)
    return f"files of it that are damaged or not complete: remove {folder}" if folder.exists() else "neither"
