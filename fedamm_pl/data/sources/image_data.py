"""``ImageData``: a labelled data set of images or features, and what is asked of one."""

import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedamm_pl.data.sources.source import Source, is_features

BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that reorder the text around them."""
MAX_NAME = 1000
"""Characters of a class's name; a report reads no longer ones."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """A labelled data set: uint8 images, or the float features of a table.

    Attributes:
        train_images: uint8 images, shape (N, C, H, W), or float32 features, shape (N, D): a tensor or another
            :class:`~fedamm_pl.data.sources.source.Source`.
        train_labels: int64, shape (N,).
        test_images: The same for testing, shape (M, ...).
        test_labels: int64, shape (M,).
        class_names: One name a class, in the order of the labels.
        clients: Who holds each training example, N names, for data that come from natural clients; None: not known.
        val_images: Validation examples that the data bring, of the same kind, or None.
        val_labels: Their labels, or None.
        rows: Name of a part -> which row of the file, from 0, each of its examples was, where one list held all parts; None:
            examples are as the data have them.
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

    @property
    def parts(self) -> dict[str, tuple[Source, Tensor]]:
        """Name of a part (train, test, and val where there is one) -> its examples and labels."""
        parts = {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}
        if self.val_images is not None and self.val_labels is not None:
            parts["val"] = self.val_images, self.val_labels
        return parts

    def with_parts(self, change: Callable[[Source], Source], label_device: torch.device) -> "ImageData":
        """Return the data with other examples, one for one, and the labels on a device."""
        changed: dict[str, Any] = {}
        for name, (images, labels) in self.parts.items():
            changed |= {f"{name}_images": change(images), f"{name}_labels": labels.to(label_device)}
        return replace(self, **changed)


class ImageInfo(TypedDict, total=False):
    """What a trained module must know of its images or features, in primitive types, so that a checkpoint of it stands alone.

    Attributes:
        image_size: Height and width in pixels; empty for features (B, D).
        mean: Channel means in [0, 1], or the D means of the features.
        std: Standard deviations of the same.
        class_names: One name a class.
        class_counts: Training examples a class that clients hold.
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
        ValueError: If images are not uint8 of shape (N, C, H, W) or finite float32 features of shape (N, D), labels are not one
            int64 an image in 0..C - 1, parts differ in shape, a class has no training image, or a name is empty, given twice
            or cannot be printed.
    """
    for part, (images, labels) in data.parts.items():
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
            f"Expected clients{where} to be {len(data.train_labels)} names, one a training example, got {len(data.clients)}."
        )
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
    """Check that names of classes can be told apart and printed.

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


def image_data(loaded: Any) -> ImageData:
    """Take the images that somebody's own code has loaded, converted where it is clear what they are.

    Clear are: an :class:`ImageData` or its parts as a tuple in the same order, with or without the names; arrays or tensors of
    uint8 images, also as (N, H, W), and as (N, H, W, C) with 1 or 3 channels, or of float features (N, D); any other
    :class:`~fedamm_pl.data.sources.source.Source`; labels as any list, array or tensor of whole numbers, also as a column; names
    as any list of texts or whole numbers, or None for the numbers of the classes.

    Args:
        loaded: What the code returned.

    Returns:
        The images, checked by :func:`check_images`.

    Raises:
        ValueError: If it is something else. The message names the part, what it is and what is expected.
    """
    names = [field.name for field in fields(ImageData)][:5]
    parts = [getattr(loaded, name) for name in names] if isinstance(loaded, ImageData) else loaded
    if isinstance(parts, list | tuple) and [len(part) if isinstance(part, tuple) else 0 for part in parts] == [2, 2]:
        parts = [*parts[0], *parts[1]]  # as Keras returns them
    if not isinstance(parts, list | tuple) or len(parts) not in (4, 5):
        raise ValueError(f"Expected `load_images` to return ImageData({', '.join(names)}), got {_kind(loaded)}.")
    train_images, test_images = _images(parts[0], "train_images"), _images(parts[2], "test_images")
    train_labels, test_labels = _labels(parts[1], "train_labels"), _labels(parts[3], "test_labels")
    more: dict[str, Any] = {}
    if isinstance(loaded, ImageData):
        more = {"clients": _holders(loaded.clients), "rows": loaded.rows}
        if (loaded.val_images is None) != (loaded.val_labels is None):
            raise ValueError("Expected val_images and val_labels to be given both or not at all, got one of them.")
        if loaded.val_images is not None:
            more["val_images"] = _images(loaded.val_images, "val_images")
            more["val_labels"] = _labels(loaded.val_labels, "val_labels")
    largest = max((int(labels.max()) for labels in (train_labels, test_labels) if labels.numel()), default=-1)
    class_names = _names(parts[4] if len(parts) == 5 else None, largest + 1)
    data = ImageData(train_images, train_labels, test_images, test_labels, class_names, **more)
    check_images(data)
    return data


def _holders(value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"Expected clients to be names, one a training example, got {_kind(value)}.")
    listed = value.tolist() if isinstance(value, np.ndarray | Tensor) else list(value)
    bad = next((i for i, name in enumerate(listed) if not isinstance(name, str | int) or not str(name).strip()), None)
    if bad is not None:
        raise ValueError(
            f"Expected clients to be names, one a training example, got {listed[bad]!r:.60} for example {bad}."
        )
    return [str(name) for name in listed]


def _images(value: Any, field: str) -> Source:
    if isinstance(value, np.ndarray) and (value.dtype == np.uint8 or (value.dtype.kind == "f" and value.ndim == 2)):
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
        return value.detach().float()
    if not isinstance(value, Tensor) and isinstance(value, Source) and not isinstance(value, np.ndarray):
        return value
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim not in (3, 4):
        raise ValueError(
            f"Expected {field} to be a tensor or array of uint8 of shape (N, C, H, W), got {_kind(value)}: pixels are whole "
            "numbers from 0 to 255; features are floats of shape (N, D)."
        )
    if value.ndim == 3:
        return value[:, None]
    if value.shape[3] in (1, 3) and min(value.shape[1:3]) > 4:
        if field == "train_images":  # the others are of the same kind
            log.info("images of shape %s are taken for (N, H, W, C), channels last", tuple(value.shape))
        return value.permute(0, 3, 1, 2).contiguous()
    return value


def _labels(value: Any, field: str) -> Tensor:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64) if array.dtype.kind in "biuf" and array.ndim == 1 else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = None
    if whole is None or (whole != array).any():
        raise ValueError(f"Expected {field} to be one whole number an image, got {_kind(value)}.")
    return torch.from_numpy(whole)


def _names(value: Any, num_classes: int) -> list[str]:
    if value is None:
        return [str(label) for label in range(num_classes)]
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(listed, list | tuple | range) or not all(
        isinstance(name, str | int | np.integer) and not isinstance(name, bool) for name in listed
    ):
        raise ValueError(f"Expected class_names to be a list of texts, one a class, got {_kind(value)}.")
    return [str(name) for name in listed]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {len(value)} {' and '.join(kinds)}"
    return type(value).__name__


def require_images(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
    """Check that an array is uint8 images, (N, H, W) or (N, H, W, C).

    Raises:
        ValueError: If it is another array; the message begins with ``what``.
    """
    channels = shape[3] if len(shape) == 4 else 1
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape or channels not in (1, 3):
        raise ValueError(
            f"Expected {what} to be uint8 of shape (N, H, W) or (N, H, W, C) with 1 or 3 channels, or floats of shape (N, D), got "
            f"{dtype} of shape {shape}."
        )


def image_tensor(array: npt.NDArray[Any], what: str) -> Tensor:
    """Turn an array of uint8 images, (N, H, W) or (N, H, W, C), into a tensor (N, C, H, W), of the same memory where it can.

    Raises:
        ValueError: If it is another array; the message begins with ``what``.
    """
    require_images(array.shape, array.dtype, what)
    array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
