"""Convert data that a user's code has loaded to ``ImageData``, if their meaning is clear."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedamm_pl.data.sources.image_data import ImageData, check_images
from fedamm_pl.data.sources.source import Source

log = logging.getLogger(__name__)


def image_data(loaded: Any) -> ImageData:
    """Convert images that a user's code has loaded to ``ImageData``, if their meaning is clear.

    Accepted are: an :class:`ImageData`, or its parts as a tuple in the same order, with or without the names; images as
    arrays or tensors of uint8, also of shape (N, H, W), or (N, H, W, C) with 1 or 3 channels; float features (N, D);
    any other :class:`~fedamm_pl.data.sources.source.Source`; labels as any list, array or tensor of integers, also as a
    column; names as any list of texts or integers, or None to use the numbers of the classes.

    Args:
        loaded: The object that the code returned.

    Returns:
        The images, checked by :func:`check_images`.

    Raises:
        ValueError: If it is something else. The message names the part, its type, and the expected type.
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
        more = {"clients": _holders(loaded.clients), "rows": loaded.rows, "feature_names": loaded.feature_names}
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
        raise ValueError(f"Expected clients to be names, one per training example, got {_kind(value)}.")
    listed = value.tolist() if isinstance(value, np.ndarray | Tensor) else list(value)
    bad = next((i for i, name in enumerate(listed) if not isinstance(name, str | int) or not str(name).strip()), None)
    if bad is not None:
        raise ValueError(
            f"Expected clients to be names, one per training example, got {listed[bad]!r:.60} for example {bad}."
        )
    return [str(name) for name in listed]


def _images(value: Any, field: str) -> Source:
    if isinstance(value, np.ndarray) and (value.dtype == np.uint8 or (value.dtype.kind == "f" and value.ndim == 2)):
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2:
        return value.detach().float()
    if isinstance(value, Source) and not isinstance(value, Tensor | np.ndarray):
        return value
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim not in (3, 4):
        raise ValueError(
            f"Expected {field} to be a tensor or array of uint8 of shape (N, C, H, W), got {_kind(value)}: pixels are whole "
            "numbers from 0 to 255; features are floats of shape (N, D)."
        )
    if value.ndim == 3:
        return value[:, None]
    if value.shape[3] in (1, 3) and min(value.shape[1:3]) > 4:
        if field == "train_images":  # log it once; the other parts are of the same kind
            log.info("images of shape %s are interpreted as (N, H, W, C), channels last", tuple(value.shape))
        return value.permute(0, 3, 1, 2).contiguous()
    if value.shape[1] == value.shape[2] > value.shape[3]:  # images are mostly square, with fewer channels than rows
        raise ValueError(
            f"Expected {field} to be of shape (N, C, H, W), got {_kind(value)}, which looks like channels last: permute it, or "
            "pad the width if that is the order."
        )
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
        raise ValueError(f"Expected {field} to be one whole number per image, got {_kind(value)}.")
    return torch.from_numpy(whole)


def _names(value: Any, num_classes: int) -> list[str]:
    if value is None:
        return [str(label) for label in range(num_classes)]
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(listed, list | tuple | range) or not all(
        isinstance(name, str | int | np.integer) and not isinstance(name, bool) for name in listed
    ):
        raise ValueError(f"Expected class_names to be a list of texts, one per class, got {_kind(value)}.")
    return [str(name) for name in listed]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {len(value)} {' and '.join(kinds)}"
    return type(value).__name__
