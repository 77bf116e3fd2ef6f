"""The networks of the jobs, in plain torch: the environments of the peers do not have our package."""

import importlib.util
from pathlib import Path

from torch import nn

OURS = Path(__file__).resolve().parents[2] / "fedamm_pl/models/resnet_cifar.py"


def mlp() -> nn.Module:
    """784-64-10, 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Two convolutions for 28x28 grey images, 20,490 parameters, without BatchNorm, whose statistics each peer treats otherwise."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def resnet32() -> nn.Module:
    """Our ResNet-32, from its file, which needs torch alone."""
    spec = importlib.util.spec_from_file_location("resnet_cifar", OURS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.ResNetCIFAR(num_classes=10, in_channels=3)
    return network


NETWORKS = {"mlp": mlp, "cnn": cnn, "resnet32": resnet32}
