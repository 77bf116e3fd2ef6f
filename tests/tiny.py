"""A problem small enough to train in milliseconds: 8x8 images in four classes, a ResNet with BatchNorm; and a table of features."""

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
    return TinyData(**{**tiny_options(), **options})


def tiny_options() -> dict[str, Any]:
    return {
        "dataset": "tiny",
        "num_clients": 4,
        "num_meta_per_class": 2,
        "imbalance_factor": 0.2,
        "batch_size": 16,
    }


def tiny_resnet(num_classes: int, in_channels: int) -> ResNetCIFAR:
    """A ResNet-8 of width 4."""
    return ResNetCIFAR(num_classes, in_channels, depth=8, width=4)


FEATURES = 6


class TinyTable(TinyData):
    """Four classes of features, each in a unit of its own: each class has means of its own in all of them."""

    def load_images(self) -> ImageData:
        generator, images = torch.Generator().manual_seed(1), super().load_images()
        means = torch.randn(NUM_CLASSES, FEATURES, generator=generator)
        units, zeros = 10.0 ** torch.arange(-3, FEATURES - 3), torch.tensor([0, -5, 0, 1e3, 0, 3e6])

        def table(labels: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(len(labels), FEATURES, generator=generator)
            return zeros + units * (means[labels] + 0.5 * noise)

        train, test = table(images.train_labels), table(images.test_labels)
        return ImageData(train, images.train_labels, test, images.test_labels, images.class_names)


def tiny_table(**options: Any) -> TinyTable:
    """TinyTable with the options of :func:`tiny_data`."""
    return TinyTable(**{**tiny_options(), **options})
