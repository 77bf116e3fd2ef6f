"""ResNets for 32x32 images (He et al., CVPR 2016, section 4.2), by default with parameter-free shortcuts (option A)."""

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the shortcut subsamples and pads channels with zeros (option A), or is a projection.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        projection: Whether a shortcut that changes the shape is a 1x1 convolution with BatchNorm (option B).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        extra = out_channels - in_channels
        self.padding = (0, 0, 0, 0, extra // 2, extra - extra // 2)
        self.projection = None
        if projection and (stride > 1 or extra):
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        shortcut = inputs
        if self.projection is not None:
            shortcut = self.projection(inputs)
        elif self.stride > 1 or any(self.padding):
            shortcut = inputs[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(shortcut, self.padding)
        hidden = functional.relu(self.bn1(self.conv1(inputs)))
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNetCIFAR(nn.Module):
    """A 3x3 convolution, three stages of basic blocks with 16, 32, 64 channels, global mean, one linear layer.

    With depth 8, width 64 and projections it is the ResNet-8 of CReFF and of papers that compare with it: 64, 128, 256
    channels, 1,227,594 parameters for ten classes of colour images. In that network the initial weights depend on the
    number of outputs of a layer, here on the number of its inputs.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        depth: Number of layers, 6n + 2 for n blocks per stage: 8, 20, 32, 44, 56.
        width: Channels of the first stage.
        projection: Whether shortcuts between stages are 1x1 convolutions with BatchNorm.

    Attributes:
        channels_last: True, since the network computes faster on images in this layout.

    Raises:
        ValueError: If the depth is not 6n + 2.
    """

    channels_last = True

    def __init__(
        self, num_classes: int, in_channels: int = 3, depth: int = 32, width: int = 16, projection: bool = False
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected `depth` to be 6n + 2 with n >= 1, got {depth}.")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            *(
                BasicBlock(
                    width * 2 ** max(stage - (block == 0), 0),
                    width * 2**stage,
                    2 if stage and block == 0 else 1,
                    projection,
                )
                for stage in range(3)
                for block in range((depth - 2) // 6)
            )
        )
        self.classifier = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        features = self.stages(hidden).mean((2, 3))
        logits: Tensor = self.classifier(features)
        return logits
