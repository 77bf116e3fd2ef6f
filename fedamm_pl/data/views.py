"""A weak and a strong view of a batch of uint8 images, as batched tensor operations on the device of the images."""

import torch
from torch import Tensor

from fedamm_pl.data.transforms import Augmentation, augment, draw_augmentation

STRONG_DEGREES = 30.0
"""Maximum rotation in the strong view of images that are not in colour."""
SHARING = 8
"""Number of images that share a draw of the AutoAugment policy."""


def turn(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image about its centre, with nearest-neighbour sampling and black where there is no image.

    Args:
        images: Images of shape (N, C, H, W).
        degrees: Counter-clockwise angles, shape (N,).

    Returns:
        Images of the same shape and type. 0 degrees return the images unchanged.
    """
    (number, channels, height, width), device = images.shape, images.device
    angles = torch.deg2rad(degrees.to(device, torch.float32))[:, None, None]
    rows = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    columns = torch.arange(width, device=device) - (width - 1) / 2
    from_rows = (angles.cos() * rows + angles.sin() * columns + (height - 1) / 2).round().long()  # (N, H, W)
    from_columns = (angles.cos() * columns - angles.sin() * rows + (width - 1) / 2).round().long()
    inside = (from_rows >= 0) & (from_rows < height) & (from_columns >= 0) & (from_columns < width)
    places = from_rows.clamp(0, height - 1) * width + from_columns.clamp(0, width - 1)
    taken = images.flatten(2).gather(2, places.view(number, 1, -1).expand(-1, channels, -1)).view_as(images)
    return taken * inside[:, None]


def cut_out(images: Tensor, centres: Tensor) -> Tensor:
    """Black out a rectangle of half the height and half the width of each image (DeVries, Taylor, arXiv 1708.04552).

    Args:
        images: Images of shape (N, C, H, W).
        centres: Row and column of its centre, integers of shape (N, 2); parts beyond the edge of the image are ignored.
    """
    (height, width), device = images.shape[2:], images.device
    centres = centres.to(device)
    rows = torch.arange(height, device=device) - centres[:, :1]  # (N, H)
    columns = torch.arange(width, device=device) - centres[:, 1:]  # (N, W)
    tall, wide = height // 2, width // 2
    in_rows = (rows >= -(tall // 2)) & (rows < tall - tall // 2)
    in_columns = (columns >= -(wide // 2)) & (columns < wide - wide // 2)
    return images * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])


def weak_view(images: Tensor, augmentation: Augmentation, degrees: float, generator: torch.Generator) -> Tensor:
    """Return images with the training transform and a random rotation.

    Args:
        images: uint8 images (N, C, H, W).
        augmentation: The training transform; none if the images have it already.
        degrees: Maximum rotation in both directions; 0: no rotation.
        generator: Source of the draws.
    """
    if augmentation != "none":
        images = augment(images, draw_augmentation(len(images), generator, augmentation).to(images.device))
    return images if degrees == 0 else turn(images, _angles(len(images), degrees, generator))


def strong_view(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Return images with the training transform, strong changes, and a hole of half their height and width.

    Colour images (three channels) are changed by AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019), with a
    new draw for every :data:`SHARING` images; other images are rotated by up to 30 degrees.

    Args:
        images: uint8 images (N, C, H, W).
        augmentation: The training transform.
        generator: Source of the draws.
    """
    images = weak_view(images, augmentation, 0, generator)
    if images.shape[1] == 3:
        seed = int(torch.randint(2**62, (), generator=generator))
        images = torch.cat([*_auto_augmented(images.split(SHARING), seed)])  # type: ignore[no-untyped-call]
    else:
        images = turn(images, _angles(len(images), STRONG_DEGREES, generator))
    height, width = images.shape[2:]
    rows = torch.randint(height, (len(images), 1), generator=generator)
    columns = torch.randint(width, (len(images), 1), generator=generator)
    return cut_out(images, torch.cat([rows, columns], 1))


def _auto_augmented(parts: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    from torchvision.transforms import v2  # takes a while to load

    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):  # the policy draws from the global state, on the CPU
        torch.default_generator.manual_seed(seed)
        return [policy(part) for part in parts]


def _angles(number: int, degrees: float, generator: torch.Generator) -> Tensor:
    return degrees * (2 * torch.rand(number, generator=generator, dtype=torch.float32) - 1)
