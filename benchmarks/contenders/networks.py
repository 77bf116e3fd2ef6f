"""Networks of the jobs in plain torch, since the environments of the peers do not have this package."""

import importlib.util
from pathlib import Path

from torch import nn

OURS = Path(__file__).resolve().parents[2] / "fedamm_pl/models/resnet_cifar.py"


def mlp() -> nn.Module:
    """Return an MLP with layers 784-64-10 and 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Return a network of two convolutions for 28x28 grey images, with 20,490 parameters.

    It has no BatchNorm, since each peer treats its statistics differently.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def resnet32() -> nn.Module:
    """Return the ResNet-32 of this package, loaded from its file, which needs only torch."""
    spec = importlib.util.spec_from_file_location("resnet_cifar", OURS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.ResNetCIFAR(num_classes=10, in_channels=3)
    return network


NETWORKS = {"mlp": mlp, "cnn": cnn, "resnet32": resnet32}
