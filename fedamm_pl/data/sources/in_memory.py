"""Data sets that are arrays already: the one in the package, npz files and torchvision's."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torch import Tensor

DOWNLOADABLE = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
}
SHIPPED = "fashion_mnist_mini"
NORMALIZATION = {  # channel means and standard deviations of the training sets, as commonly published
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    SHIPPED: ((0.2860,), (0.3530,)),
}
KEYS = (  # Keras, MedMNIST
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
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
CLASS_NAMES = {"cifar10": CIFAR10_CLASSES, "fashion_mnist": FASHION_CLASSES, SHIPPED: FASHION_CLASSES}
MAX_CLASSES = 100_000
"""Labels beyond are taken for a mistake."""


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set.

    Attributes:
        train_images: uint8, shape (N, C, H, W).
        train_labels: int64, shape (N,).
        test_images: uint8, shape (M, C, H, W).
        test_labels: int64, shape (M,).
        class_names: One name a class, in the order of the labels.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]


class ImageInfo(TypedDict, total=False):
    """What a trained module must know of its images, in primitive types, so that a checkpoint of it stands alone.

    Attributes:
        image_size: Height and width in pixels.
        mean: Channel means in [0, 1].
        std: Channel standard deviations.
        class_names: One name a class.
        class_counts: Training images a class.
        shot_rule: The rule that made the shot groups.
        shot_groups: Group name -> class indices.
    """

    image_size: list[int]
    mean: list[float]
    std: list[float]
    class_names: list[str]
    class_counts: list[int]
    shot_rule: str
    shot_groups: dict[str, list[int]]


def check_images(data: ImageData, where: str = "") -> None:
    """Check what a data set may get wrong, before it fails in the middle of a run.

    Args:
        data: The data set.
        where: Where it comes from, for the messages, for example " of <file>".

    Raises:
        ValueError: If images are not uint8 of shape (N, C, H, W), labels are not one int64 an image in 0..C - 1, or training
            and test images differ in shape.
    """
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
            raise ValueError(
                f"Expected {part}_images{where} to be uint8 of shape (N, C, H, W), got {images.dtype} of shape "
                f"{tuple(images.shape)}."
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"Expected {part}_labels{where} to be {len(images)} of int64, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        least, largest, bound = int(labels.min()), int(labels.max()), len(data.class_names)
        if least < 0 or largest >= bound:
            raise ValueError(f"Expected {part}_labels{where} to be in 0..{bound - 1}, got {least} to {largest}.")
    if data.train_images.shape[1:] != data.test_images.shape[1:]:
        raise ValueError(
            f"Expected training and test images{where} to be of one shape (C, H, W), "
            f"got {tuple(data.train_images.shape[1:])} and {tuple(data.test_images.shape[1:])}."
        )


def read_shipped() -> ImageData:
    """Read the data set that is in the package."""
    with resources.as_file(resources.files("fedamm_pl.data") / SHIPPED / f"{SHIPPED}.npz") as path:
        return read_npz(path, CLASS_NAMES[SHIPPED])


def read_torchvision(dataset: str, root: Path) -> ImageData:
    """Read a data set by torchvision, which downloads it if it is not there.

    Args:
        dataset: A key of ``DOWNLOADABLE``.
        root: The folder of torchvision's files.

    Returns:
        The images in memory.

    Raises:
        ValueError: If it is neither there whole nor can be downloaded.
    """
    loader: Any = DOWNLOADABLE[dataset]
    try:
        try:
            train, test = (loader(root, train=part, download=False) for part in (True, False))
        except RuntimeError:  # not there, or damaged
            train, test = (loader(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, AssertionError, ValueError) as error:  # no network, or damaged files
        raise ValueError(
            f"Expected {dataset} under `root` = {root} or a network to download it, got neither ({error}). Three ways: run "
            f"once with network; copy torchvision's files of it into {root}; or put {root / dataset}.npz there (x_train, "
            f"y_train, x_test, y_test). The data set {SHIPPED} needs none of them."
        ) from error
    pixels = {part: np.asarray(images.data) for part, images in (("train", train), ("test", test))}
    return ImageData(
        image_tensor(pixels["train"], "the training images"),
        torch.as_tensor(train.targets),
        image_tensor(pixels["test"], "the test images"),
        torch.as_tensor(test.targets),
        CLASS_NAMES.get(dataset, list(train.classes)),
    )


def read_npz(path: Path, class_names: list[str] | None = None) -> ImageData:
    """Read images from an npz file with Keras keys (``x_train``...) or MedMNIST keys (``train_images``...).

    Args:
        path: The file. Images are uint8 of shape (N, H, W) or (N, H, W, C); labels are integers of shape (N,) or (N, 1).
            Objects pickled inside are refused.
        class_names: Names of the classes; by default their numbers.

    Returns:
        The images in memory.

    Raises:
        ValueError: If the file is damaged, lacks a key, or holds arrays of another kind. The message names file and key.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = list(archive.keys())
            keys = next((keys for keys in KEYS if set(keys) <= set(found)), ())
            arrays = [archive[key] for key in keys]
    except ValueError as error:  # objects, which would have to be unpickled
        raise ValueError(f"Expected {path} to be a npz file of plain arrays, got: {one_line(error)}.") from error
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(
            f"Expected {path} to be a whole npz file, got one that cannot be read ({one_line(error)})."
        ) from error
    for key, array in zip(keys, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise ValueError(f"Expected {key} of {path} to be an array, got {type(array).__name__}.")
    if not keys:
        wanted, names = " or ".join(", ".join(keys) for keys in KEYS), [" ".join(name.split()) for name in found]
        raise ValueError(f"Expected {path} to hold {wanted}, got {', '.join(names) or 'nothing'}.")
    x_train, y_train, x_test, y_test = arrays
    data = ImageData(
        image_tensor(x_train, f"{keys[0]} of {path}"),
        _labels(y_train, len(x_train), f"{keys[1]} of {path}"),
        image_tensor(x_test, f"{keys[2]} of {path}"),
        _labels(y_test, len(x_test), f"{keys[3]} of {path}"),
        [],
    )
    data.class_names.extend(
        class_names or map(str, range(int(max(data.train_labels.max(), data.test_labels.max())) + 1))
    )
    check_images(data, f" of {path}")
    return data


def image_tensor(array: npt.NDArray[Any], what: str) -> Tensor:
    """Turn an array of uint8 images, (N, H, W) or (N, H, W, C), into a tensor (N, C, H, W).

    Raises:
        ValueError: If it is another array; the message begins with ``what``.
    """
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.size == 0 or channels not in (1, 3):
        raise ValueError(
            f"Expected {what} to be uint8 of shape (N, H, W) or (N, H, W, C) with 1 or 3 channels, got {array.dtype} of shape {array.shape}."
        )
    array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(array, order="C"))


def _labels(array: npt.NDArray[Any], num_images: int, what: str) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (num_images,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"Expected {what} to be {num_images} integers, got {array.dtype} of shape {array.shape}.")
    if array.min() < 0 or array.max() >= MAX_CLASSES:
        raise ValueError(f"Expected {what} to be in 0..{MAX_CLASSES - 1}, got {array.min()} to {array.max()}.")
    return torch.from_numpy(array.astype(np.int64))


def require_regular_file(path: Path) -> None:
    """Refuse a pipe, a device or a folder, which might keep a reader waiting for ever.

    Raises:
        OSError: If there is something at ``path`` that is no regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


def one_line(error: Exception) -> str:
    """Return what an error says, without line breaks; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
