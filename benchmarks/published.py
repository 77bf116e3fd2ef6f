"""Networks of the published experiments that ``configs/compare_published_*.yaml`` repeat."""

from torch import nn


def mlp(num_classes: int, in_channels: int) -> nn.Module:
    """Return an MLP with two hidden layers of 200 units for 28x28 images (the 2NN of McMahan et al., AISTATS 2017)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * 28 * 28, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, num_classes),
    )
