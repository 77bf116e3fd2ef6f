"""The description of a data set: the information that a trained module needs, and a hash of its content."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedamm_pl.data.sources import ImageData, ImageInfo
from fedamm_pl.data.sources.source import Source, content, is_features
from fedamm_pl.data.transforms import channel_statistics, feature_statistics
from fedamm_pl.metrics import shot_groups

STATISTICS_OF = 5000
"""Number of images from which mean and standard deviation are computed if each must be read from a file."""
log = logging.getLogger(__name__)


def describe(
    images: ImageData,
    train: Tensor,
    class_counts: list[int],
    options: Mapping[str, Any],
    published: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> ImageInfo:
    """Return the information about the images that the trained module needs, in primitive types.

    Args:
        images: The data.
        train: Indices of the training examples of all clients together.
        class_counts: Number of these examples in each class.
        options: Options of the data module.
        published: Published channel means and standard deviations of the data set; None: they are computed.
    """
    if is_features(images.train_images):
        mean, std = feature_statistics(images.train_images, train)
    elif published is None or len(published[0]) != images.train_images.shape[1]:
        mean, std = channel_statistics(images.train_images, _sample(train, images.train_images))
    else:
        mean, std = published
    return ImageInfo(
        image_size=list(images.train_images.shape[2:]),
        mean=list(mean),
        std=list(std),
        class_names=list(images.class_names),
        class_counts=class_counts,
        shot_rule=options["shot_rule"],
        shot_groups=grouped(class_counts, options),
    )


def grouped(class_counts: list[int], options: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shot groups for class counts, according to the options of a data module."""
    ranges = options["shot_ranges"] and {name: list(pair) for name, pair in options["shot_ranges"].items()}
    return shot_groups(class_counts, options["shot_rule"], ranges)


def _sample(indices: Tensor, images: Source) -> Tensor:
    """Return the images from which statistics are computed; of files read when needed, an evenly spaced sample."""
    if isinstance(images, Tensor) or len(indices) <= STATISTICS_OF:
        return indices
    log.info("normalisation: mean and standard deviation of %d of %d training images", STATISTICS_OF, len(indices))
    return indices[torch.linspace(0, len(indices) - 1, STATISTICS_OF).long()]


def examples_hash(images: ImageData) -> str:
    """Return a short hash of all examples, labels and class names."""
    digest = hashlib.sha256()
    for part in (part for pair in images.parts.values() for part in pair):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(content(part))
    digest.update("\0".join(images.class_names).encode())
    return digest.hexdigest()[:16]


def content_hash(examples: str, clients: Sequence[str] | None) -> str:
    """Return a short hash of examples, given their hash, and of the client of each example if the data name it."""
    if clients is None:
        return examples
    return hashlib.sha256("\0".join((examples, *clients)).encode()).hexdigest()[:16]
