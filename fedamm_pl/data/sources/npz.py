"""npz files: four arrays in a zip archive, whose headers are checked before any array is unpacked."""

import logging
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.image_data import ImageData, check_images, image_tensor, require_images
from fedamm_pl.data.sources.reading import UnusableFileError, amount, reading, require_memory, some
from fedamm_pl.terminal import printable

KEYS = (  # Keras, MedMNIST
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
MAX_CLASSES = 100_000
"""Labels must be smaller; others are regarded as a mistake."""
MAX_RATIO, RATIO_COUNTS_FROM = 500, 2**28
"""A file that unpacks to more than 256 MiB and to more than 500 times its size is refused as almost empty."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """The header of an array.

    Attributes:
        shape: The array's shape.
        dtype: The array's type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size of the array's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npz(path: Path, class_names: list[str] | None = None) -> ImageData:
    """Read images or features from an npz file with Keras keys (``x_train``...) or MedMNIST keys (``train_images``...).

    Shapes, types and sizes are checked before any value is unpacked. Other arrays in the file are not used, which is
    logged.

    Args:
        path: The file. Images are uint8 of shape (N, H, W) or (N, H, W, C), features floats of shape (N, D); labels are
            integers of shape (N,) or (N, 1). Pickled objects are refused.
        class_names: Names of the classes; by default their numbers.

    Returns:
        The examples in memory.

    Raises:
        ValueError: If the file is damaged, lacks a key, holds arrays of another kind or does not fit into memory, or if
            a class has no training images. The message names file and key.
    """
    with _opened(path) as archive:
        keys = _keys(archive, path)
        headers = [_header(archive, key, path) for key in keys]
    for images, labels, key, label_key in zip(headers[::2], headers[1::2], keys[::2], keys[1::2], strict=True):
        if not _is_table(images):
            require_images(images.shape, images.dtype, f"{key} of {path}")
        _require_labels(labels, images.shape[0], f"{label_key} of {path}")
    _require_room(path, headers)
    data = ImageData(
        _examples(_array(path, keys[0]), f"{keys[0]} of {path}"),
        _labels(_array(path, keys[1]), f"{keys[1]} of {path}"),
        _examples(_array(path, keys[2]), f"{keys[2]} of {path}"),
        _labels(_array(path, keys[3]), f"{keys[3]} of {path}"),
        [],
    )
    data.class_names.extend(
        class_names or map(str, range(int(max(data.train_labels.max(), data.test_labels.max())) + 1))
    )
    check_images(data, f" of {path}")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    expected = "a whole npz file, got one that cannot be read"
    with reading(path, expected), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


def _keys(archive: zipfile.ZipFile, path: Path) -> tuple[str, ...]:
    members = archive.namelist()
    found = [name.removesuffix(".npy") for name in members]
    keys = next((keys for keys in KEYS if {f"{key}.npy" for key in keys} <= set(members)), ())
    if not keys:
        wanted, names = " or ".join(", ".join(keys) for keys in KEYS), [" ".join(name.split()) for name in found]
        raise UnusableFileError(f"Expected {path} to hold {wanted}, got {', '.join(names) or 'nothing'}.")
    if doubled := [key for key in keys if members.count(f"{key}.npy") > 1]:
        raise UnusableFileError(f"Expected {path} to hold {doubled[0]} once, got it several times.")
    if unused := [printable(name) for name in found if name not in keys]:
        log.warning("%s: %d other arrays are not used: %s", path, len(unused), some(unused))
    return keys


def _header(archive: zipfile.ZipFile, key: str, path: Path) -> Header:
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):  # version 3 is for field names, which images do not have
            raise ValueError(f"{key} is of the unknown npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read(member)
        except Exception as error:  # the parser's message is empty, or advice on options that do not exist here
            raise ValueError(f"{key} has a header that cannot be parsed") from error
        header = Header(shape, dtype)
        if dtype.hasobject:
            raise UnusableFileError(
                f"Expected {path} to be an npz file of plain arrays, got Python objects in {key}, which are never loaded: save "
                "it as an array of numbers."
            )
        if min(shape, default=0) < 0 or member.tell() + header.nbytes != info.file_size:
            raise ValueError(f"{key} is of another length than its header says")
    return header


def _require_room(path: Path, headers: list[Header]) -> None:
    unpacked, packed = sum(header.nbytes for header in headers), path.stat().st_size
    if unpacked > max(MAX_RATIO * packed, RATIO_COUNTS_FROM):
        raise UnusableFileError(
            f"Expected {path} to hold examples, got a file of {amount(packed)} that unpacks to {amount(unpacked)}, more than "
            f"{MAX_RATIO} times as much: its arrays are almost empty."
        )
    # while channels are moved to the front or types are converted, one part exists twice
    require_memory(
        unpacked + max(header.nbytes for header in headers if len(header.shape) != 3), f"the examples of {path}"
    )


def _array(path: Path, key: str) -> npt.NDArray[Any]:
    with _opened(path) as archive, archive.open(f"{key}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        member.read(1)  # the checksum is verified at the end of the file
    return np.asarray(array)


def _is_table(header: Header | npt.NDArray[Any]) -> bool:
    """Whether an array contains features (N, D) of any floating-point type."""
    return header.dtype.kind == "f" and len(header.shape) == 2 and 0 not in header.shape


def _examples(array: npt.NDArray[Any], what: str) -> Tensor:
    if not _is_table(array):
        return image_tensor(array, what)
    with np.errstate(over="ignore"):  # infinity is detected and reported later
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _require_labels(header: Header, num_images: int, what: str) -> None:
    if header.shape not in ((num_images,), (num_images, 1)) or not np.issubdtype(header.dtype, np.integer):
        raise UnusableFileError(
            f"Expected {what} to be {num_images} integers, got {header.dtype} of shape {header.shape}."
        )


def _labels(array: npt.NDArray[Any], what: str) -> Tensor:
    if array.min() < 0 or array.max() >= MAX_CLASSES:
        raise UnusableFileError(f"Expected {what} to be in 0..{MAX_CLASSES - 1}, got {array.min()} to {array.max()}.")
    return torch.from_numpy(array.ravel().astype(np.int64))
