"""A problem small enough to train in milliseconds: 8x8 images in four classes, a ResNet with BatchNorm."""

from typing import Any

import torch

from fedamm_pl import FederatedDataModule
from fedamm_pl.data import ImageData
from fedamm_pl.models import ResNetCIFAR

NUM_CLASSES = 4


class TinyData(FederatedDataModule):
    """Four classes of 8x8 grey images, each with a bright column of its own: 240 for training, 80 for testing."""

    def load_images(self) -> ImageData:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 100, (320, 1, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(320) % NUM_CLASSES
        images[torch.arange(320), :, :, 2 * labels] += 100
        return ImageData(images[:240], labels[:240], images[240:], labels[240:], list("abcd"))


def tiny_data(**options: Any) -> TinyData:
    """TinyData with 4 clients, 2 meta images a class, a tail of 0.2 and batches of 16, unless told otherwise."""
    defaults: dict[str, Any] = {
        "dataset": "tiny",
        "num_clients": 4,
        "num_meta_per_class": 2,
        "imbalance_factor": 0.2,
        "batch_size": 16,
    }
    return TinyData(**{**defaults, **options})


def tiny_resnet(num_classes: int, in_channels: int) -> ResNetCIFAR:
    """A ResNet-8 of width 4."""
    return ResNetCIFAR(num_classes, in_channels, depth=8, width=4)
