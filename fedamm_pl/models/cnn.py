"""A small convolutional network for images of about 28x28 or 32x32 pixels."""

from torch import Tensor, nn


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


class SmallCNN(nn.Module):
    """Three 3x3 convolutions (32, 64, 128 channels) with BatchNorm, two poolings, global mean, one linear layer.

    It has about 94,000 parameters and takes images of 4x4 pixels or more.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.

    Attributes:
        channels_last: True, since the network computes faster on images in this layout.
    """

    channels_last = True

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_channels, 32), nn.MaxPool2d(2), *_block(32, 64), nn.MaxPool2d(2), *_block(64, 128)
        )
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        features = self.features(images).mean((2, 3))  # a plain mean: its gradient is deterministic on a GPU
        logits: Tensor = self.classifier(features)
        return logits
