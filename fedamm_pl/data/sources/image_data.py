"""``ImageData``: a labelled data set of images or features, and its checks."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.source import Source, is_features

BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that reorder the text around them."""
MAX_NAME = 1000
"""Maximum number of characters in the name of a class; a report accepts no longer names."""


@dataclass(frozen=True)
class ImageData:
    """A labelled data set: uint8 images, or the float features of a table.

    Attributes:
        train_images: uint8 images, shape (N, C, H, W), or float32 features, shape (N, D): a tensor or another
            :class:`~fedamm_pl.data.sources.source.Source`.
        train_labels: int64, shape (N,).
        test_images: Images or features for testing, shape (M, ...).
        test_labels: int64, shape (M,).
        class_names: One name per class, in the order of the labels.
        clients: The client of each training example, N names, for data with natural clients; None: not known.
        val_images: Validation examples of the data, of the same kind, or None.
        val_labels: Their labels, or None.
        rows: Name of a part -> row of each of its examples, from 0, in the file that lists them; the rows of several
            files are counted consecutively. None: no file lists them.
        feature_names: One name per feature, in the order of the columns of a table; None: not known.
    """

    train_images: Source
    train_labels: Tensor
    test_images: Source
    test_labels: Tensor
    class_names: list[str]
    clients: Sequence[str] | None = None
    val_images: Source | None = None
    val_labels: Tensor | None = None
    rows: Mapping[str, Tensor] | None = None
    feature_names: list[str] | None = None

    @property
    def parts(self) -> dict[str, tuple[Source, Tensor]]:
        """Name of a part (train, test, and val if there is one) -> its examples and labels."""
        parts = {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}
        if self.val_images is not None and self.val_labels is not None:
            parts["val"] = self.val_images, self.val_labels
        return parts

    def with_parts(self, change: Callable[[Source], Source], label_device: torch.device) -> "ImageData":
        """Return the data with the examples of each part replaced one for one, and with the labels on a device."""
        changed: dict[str, Any] = {}
        for name, (images, labels) in self.parts.items():
            changed |= {f"{name}_images": change(images), f"{name}_labels": labels.to(label_device)}
        return replace(self, **changed)


class ImageInfo(TypedDict, total=False):
    """Information about the images or features, in primitive types, that makes a module's checkpoint self-contained.

    Attributes:
        image_size: Height and width in pixels; empty for features (B, D).
        mean: Channel means in [0, 1], or the D means of the features.
        std: Standard deviations of the channels or features.
        class_names: One name per class.
        class_counts: Training examples per class that clients hold.
        shot_rule: The rule by which the shot groups were formed.
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
    """Check a data set for errors that would otherwise appear in the middle of a run.

    Args:
        data: The data set.
        where: The source of the data, for messages, for example " of <file>".

    Raises:
        ValueError: If images are not uint8 of shape (N, C, H, W) or finite float32 features of shape (N, D), labels are
            not one int64 per image in 0..C - 1, parts differ in shape, a class has no training image, or a name is
            empty, is given twice, or cannot be printed.
    """
    for part, (images, labels) in data.parts.items():
        if part == "test" and not len(labels):  # a single client need not have test examples
            continue
        if (images.dtype, len(images.shape)) not in ((torch.uint8, 4), (torch.float32, 2)) or 0 in images.shape:
            raise ValueError(
                f"Expected {part}_images{where} to be uint8 of shape (N, C, H, W) or float32 of shape (N, D), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if is_features(images):
            _check_finite(images, f"{part}_images{where}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"Expected {part}_labels{where} to be {len(images)} of int64, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        least, largest, bound = int(labels.min()), int(labels.max()), len(data.class_names)
        if least < 0 or largest >= bound:
            raise ValueError(f"Expected {part}_labels{where} to be in 0..{bound - 1}, got {least} to {largest}.")
        if images.shape[1:] != data.train_images.shape[1:]:
            kind = "training and test images" if part == "test" else "training and validation images"
            raise ValueError(
                f"Expected {kind}{where} to be of one shape {'(D,)' if len(images.shape) == 2 else '(C, H, W)'}, "
                f"got {tuple(data.train_images.shape[1:])} and {tuple(images.shape[1:])}."
            )
    if data.clients is not None and len(data.clients) != len(data.train_labels):
        raise ValueError(
            f"Expected clients{where} to be {len(data.train_labels)} names, one per training example, got {len(data.clients)}."
        )
    sizes = {part: len(labels) for part, (_, labels) in data.parts.items() if len(labels)}
    if data.rows is not None and (got := {part: len(rows) for part, rows in data.rows.items()}) != sizes:
        raise ValueError(f"Expected rows{where} to be those of the examples, {sizes}, got {got}.")
    check_names(data.class_names, where)
    absent = (data.train_labels.bincount(minlength=bound) == 0).nonzero().flatten().tolist()
    if absent:
        more = f" and {len(absent) - 1} more of {bound}" if len(absent) > 1 else ""
        raise ValueError(
            f"Expected every class{where} to have training examples, got none for class {data.class_names[absent[0]]}{more}: "
            "leave it out, or number the classes without gaps."
        )


def _check_finite(features: Source, what: str) -> None:
    for start in range(0, len(features), 2**16):
        bad = (~features[start : start + 2**16].isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"Expected {what} to be finite in float32, got NaN or infinity in row {start + row}, column {column} (from 0)."
            )


def check_names(names: Sequence[str], where: str = "") -> None:
    """Check that the names of classes are different and can be printed.

    Raises:
        ValueError: If a name is empty, too long, given twice, or holds line breaks or other control characters.
    """
    seen = set()
    for name in names:
        if not name.strip() or any(
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDIRECTIONAL
            for character in name
        ):
            raise ValueError(
                f"Expected class_names{where} to be names without line breaks and control characters, got {name!a}."
            )
        if len(name) > MAX_NAME:
            raise ValueError(f"Expected class_names{where} to have at most {MAX_NAME:,} characters, got {len(name):,}.")
        same = unicodedata.normalize("NFC", name)
        if same in seen:
            raise ValueError(f"Expected class_names{where} to differ, got {name!r} twice.")
        seen.add(same)


def require_images(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
    """Check that an array contains uint8 images, (N, H, W) or (N, H, W, C).

    Raises:
        ValueError: If it is a different array; the message names it as ``what``.
    """
    channels = shape[3] if len(shape) == 4 else 1
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape or channels not in (1, 3):
        raise ValueError(
            f"Expected {what} to be uint8 of shape (N, H, W) or (N, H, W, C) with 1 or 3 channels, or floats of shape (N, D), got "
            f"{dtype} of shape {shape}."
        )


def image_tensor(array: npt.NDArray[Any], what: str) -> Tensor:
    """Convert uint8 images, an array (N, H, W) or (N, H, W, C), to a tensor (N, C, H, W), without a copy if possible.

    Raises:
        ValueError: If it is a different array; the message names it as ``what``.
    """
    require_images(array.shape, array.dtype, what)
    array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
