"""Augmentation and normalisation as batched tensor operations on uint8 images."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedamm_pl.data.sources.source import Source, stream
from fedamm_pl.precision import at_least_float32

Augmentation = Literal["crop_flip", "crop", "none"]
PADDING = 4


def draw_augmentation(num_images: int, generator: torch.Generator, augmentation: Augmentation) -> Tensor:
    """Draw the parameters of a random crop with padding 4 and of a horizontal flip.

    Args:
        num_images: Number of images N.
        generator: Source of the draws, on the CPU.
        augmentation: ``crop_flip``, ``crop`` (never flipped) or ``none``.

    Returns:
        Integers of shape (N, 3): row offset and column offset in 0..8, and 1 if the image is flipped.
    """
    offsets = torch.randint(2 * PADDING + 1, (num_images, 2), generator=generator)
    flips = torch.randint(2, (num_images, 1), generator=generator)
    draws = torch.cat([offsets, flips], dim=1)
    match augmentation:
        case "crop_flip":
            return draws
        case "crop":
            return draws * torch.tensor([1, 1, 0])
        case "none":
            return torch.tensor([[PADDING, PADDING, 0]]).expand(num_images, 3)
    raise ValueError(f"Expected `augmentation` to be crop_flip, crop or none, got {augmentation!r}.")


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Crop each image, padded with zeros, at its offset, and flip it horizontally if drawn.

    Args:
        images: Images of shape (N, C, H, W).
        draws: The result of :func:`draw_augmentation`, on the device of the images.

    Returns:
        Images of the same shape and type. Offsets of 4 without a flip return the images unchanged.
    """
    num_images, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    rows = draws[:, :1] + torch.arange(height, device=images.device)  # (N, H)
    columns = draws[:, 1:2] + torch.arange(width, device=images.device)  # (N, W)
    columns = torch.where(draws[:, 2:] == 1, columns.flip(1), columns)
    which = torch.arange(num_images, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Convert uint8 images to normalised floating-point images.

    Args:
        images: uint8 images of shape (N, C, H, W).
        mean: Channel means in [0, 1], shape (C,); the result has the same type.
        std: Channel standard deviations, shape (C,).

    Returns:
        ``(images / 255 - mean) / std``.

    Raises:
        ValueError: If images have another shape.
    """
    if images.ndim != 4 or images.shape[1] != len(mean):
        raise ValueError(f"Expected images of shape (B, {len(mean)}, H, W), got {tuple(images.shape)}.")
    # in place, on a copy: takes a third of the time
    return images.to(mean.dtype, copy=True).div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def standardize(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean from features and divide by the standard deviation, in float32 or better.

    Args:
        features: Raw features of shape (B, D).
        mean: Their means, shape (D,), in float32 or better; with less precision, small deviations from a large mean
            would be lost.
        std: Their standard deviations, shape (D,).

    Raises:
        ValueError: If the number of features is not D.
    """
    if features.shape[1:] != mean.shape:
        raise ValueError(f"Expected features of shape (B, {len(mean)}), got {tuple(features.shape)}.")
    return (at_least_float32(features) - mean) / std


def require_suited(shape: Sequence[int], augmentation: Augmentation | None) -> None:
    """Check that a crop cannot shift an image out completely, as it could with table features in the form of images.

    Args:
        shape: Shape of one example: (C, H, W), or (D,) for features.
        augmentation: The training transform; None: crop_flip for images, none for features.

    Raises:
        ValueError: If ``augmentation`` crops, and the examples are features, or the height or width of an image is not
            larger than the padding.
    """
    if len(shape) == 1:
        if augmentation not in (None, "none"):
            raise ValueError(f"Expected `augmentation` to be none for features, got {augmentation}.")
        return
    height, width = shape[1:]
    augmentation = augmentation or "crop_flip"
    if augmentation != "none" and min(height, width) <= PADDING:
        raise ValueError(
            f"Expected `augmentation` to be none for images of {height} x {width} pixels, which a crop with padding {PADDING} "
            f"can shift out completely, got {augmentation}."
        )


def channel_statistics(images: Source, indices: Tensor | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images (N, C, H, W), scaled to [0, 1].

    A constant channel gets a standard deviation of 1, so that normalisation does not divide by zero.

    Args:
        images: The images.
        indices: Indices of the images to use, shape (n,); by default all.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    indices = torch.arange(len(images)) if indices is None else indices
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    at_once = max(1, 2**22 // (images.shape[2] * images.shape[3]))  # 32 MB as int64
    for part in stream(images, torch.split(indices, at_once)):
        for count, channel in zip(counts, part.unbind(1), strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = float(share @ levels)
        std = float((share @ (levels - mean) ** 2).sqrt())
        means.append(mean)
        stds.append(std if std > 0 else 1.0)
    return tuple(means), tuple(stds)


def feature_statistics(features: Source, indices: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each of the D features (N, D), computed in float64.

    A constant feature gets a standard deviation of 1, so that standardisation does not divide by zero.

    Args:
        features: The features.
        indices: Indices of the examples to use, shape (n,).
    """
    parts = torch.split(indices, max(1, 2**22 // features.shape[1]))
    mean = sum(part.double().sum(0) for part in stream(features, parts)) / len(indices)
    square = sum((part.double() - mean).square().sum(0) for part in stream(features, parts)) / len(indices)
    std = torch.as_tensor(square).sqrt()
    constant = (std <= 1e-12 * torch.as_tensor(mean).abs()) | (std.float() == 0)  # modules store it in float32
    return tuple(torch.as_tensor(mean).tolist()), tuple(std.where(~constant, 1).tolist())
