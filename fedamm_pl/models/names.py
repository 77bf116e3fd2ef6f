"""The networks that can be chosen by name: the package's own, an MLP of any widths, and torchvision's classifiers."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models as torchvision_models

from fedamm_pl.hints import similar
from fedamm_pl.models.cnn import SmallCNN
from fedamm_pl.models.mlp import MLP
from fedamm_pl.models.resnet_cifar import ResNetCIFAR

Builder = Callable[[int, int], nn.Module]
MODELS: dict[str, Builder] = {
    "small_cnn": SmallCNN,
    **{f"resnet{depth}": partial(ResNetCIFAR, depth=depth) for depth in (20, 32, 44, 56)},
    "resnet8_wide": partial(ResNetCIFAR, depth=8, width=64, projection=True),
    "mlp": MLP,
}
WIDTHS = re.compile(r"mlp((?:-[1-9]\d{0,4}){1,20})")
"""Pattern of MLP names: up to 20 hidden layers with widths of up to 99,999."""
NAMES = (
    f"{', '.join(MODELS)}, mlp-256-128 (hidden layers of these widths), a classifier of torchvision.models by its name"
)
"""The networks that can be chosen by name, as messages list them."""


def registered(name: str) -> Builder | None:
    """Return the builder of a named network, called with ``num_classes`` and ``in_channels``; None for other names.

    Such a name is safe in a file: nothing is imported, and no weights are requested.

    Args:
        name: A key of ``MODELS``, ``mlp-`` and widths, or a classifier of ``torchvision.models``. ``MODELS`` has
            precedence.

    Example:
        >>> registered("mlp-8-4")(3, 5).classifier
        Linear(in_features=4, out_features=3, bias=True)
    """
    if name in MODELS:
        return MODELS[name]
    if widths := WIDTHS.fullmatch(name):
        return partial(MLP, hidden=tuple(int(width) for width in widths[1][1:].split("-")))
    return partial(_of_torchvision, name) if name in _torchvision_names() else None


def suggestion(name: str) -> str:
    """Return the end of a message about an unknown name, with a similar name as a suggestion if there is one."""
    close = similar(name, [*MODELS, *_torchvision_names()])
    return f"; did you mean {close}?" if close else "."


def _torchvision_names() -> list[str]:
    return list(torchvision_models.list_models(module=torchvision_models))


def _of_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Build a network from torchvision.

    Raises:
        ValueError: If images are not in colour, which all of them expect.
    """
    if in_channels != 3:
        raise ValueError(
            f"Expected `model` to be a network for {in_channels} channels or features, got {name} of torchvision, which needs images "
            f"with 3 channels: use one of {', '.join(MODELS)}, or a function of your own that builds it and replaces its first layer."
        )
    # without the auxiliary classifiers of these two, which would be sent but never trained
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    with _ReadableNumbers() if name.startswith("regnet") else nullcontext():
        network: nn.Module = torchvision_models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network


class _ReadableNumbers(TorchFunctionMode):
    """Creates the numbers from which RegNets compute their widths on the CPU, even if parameters take no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "cpu"} if func in (torch.arange, torch.tensor) else {})})
