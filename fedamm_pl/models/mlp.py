"""A multilayer perceptron, for tables of features; it takes images too, pixel by pixel."""

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden linear layers with ReLU, and a linear layer that gives the logits.

    Images are flattened. The first layer takes its number of inputs from the first examples, like torch's lazy layers.
    A module that knows the size of the examples from ``info`` completes the layer when the module is created.

    Args:
        num_classes: Number of classes C.
        in_channels: Number of features D of a table, or of image channels; the input size follows from the examples.
        hidden: Widths of the hidden layers.
        dropout: Share of each hidden layer's outputs that training sets to 0, in [0, 1).

    Raises:
        ValueError: If a width is below 1, or the share is not in [0, 1).
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, hidden: Sequence[int] = (64,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"Expected `hidden` to be widths of 1 or more, got {list(hidden)}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected `dropout` to be in [0, 1), got {dropout}.")
        layers: list[nn.Module] = []
        for before, width in zip((None, *hidden), hidden, strict=False):
            layers += [nn.LazyLinear(width) if before is None else nn.Linear(before, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(hidden[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map features (B, D) or images (B, in_channels, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(inputs.flatten(1)))
        return logits
