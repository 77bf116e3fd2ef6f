"""Images that tell which they are, and what the batches of a loader hold."""

import numpy as np
import torch
from torch import Tensor

from fedamm_pl.data.client import BatchLoader


def numbered(count: int, *channels: int) -> np.ndarray:
    """Images of 6 x 6 pixels, the first two of which spell the number of the image."""
    images = np.random.default_rng(1).integers(0, 256, (count, 6, 6, *channels), dtype=np.uint8)
    first = np.arange(count).reshape(-1, *[1] * len(channels))
    images[:, 0, 0], images[:, 0, 1] = first // 256, first % 256
    return images


def numbers(images: Tensor) -> list[int]:
    """Which images they are; only for images that are not augmented."""
    return (images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1].long()).tolist()


def labels_of(loader: BatchLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )
