"""Networks, chosen by name: plain ``nn.Module`` classes that map (B, in_channels, H, W) to (B, num_classes)."""

import importlib
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fedamm_pl.models.cnn import SmallCNN
from fedamm_pl.models.resnet_cifar import ResNetCIFAR
from fedamm_pl.models.weight_net import WeightNet

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    **{f"resnet{depth}": partial(ResNetCIFAR, depth=depth) for depth in (20, 32, 44, 56)},
}

__all__ = [
    "MODELS",
    "ResNetCIFAR",
    "SmallCNN",
    "WeightNet",
    "build_model",
    "features_and_logits",
    "last_linear",
]


def build_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Build a network by name.

    Args:
        name: A key of ``MODELS``, or the import path of a callable(num_classes, in_channels) -> Module.
        num_classes: Number of classes C.
        in_channels: Image channels.

    Returns:
        The network, freshly initialised from torch's global random state.

    Raises:
        ValueError: If there is no such name, or the callable does not return a network.
    """
    known = (
        f"Expected `model` to be one of {', '.join(MODELS)} or an import path of a callable(num_classes, in_channels)"
    )
    build = MODELS.get(name)
    if build is None:
        path, _, attribute = name.rpartition(".")
        try:
            build = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{known}, got {name!r}" + (f" ({error})." if path else ".")) from error
    try:
        model = build(num_classes, in_channels)
    except TypeError as error:
        raise ValueError(f"{known}, got {name!r}, which cannot be called so ({error}).") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{known}, got {name!r}, which returned {type(model).__name__}.")
    return model


def last_linear(model: nn.Module) -> nn.Linear:
    """Return the linear layer at the end of a network, its classifier: the last one that it registered.

    Raises:
        ValueError: If it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"Expected `model` to end in a linear layer, got {type(model).__name__} without any.")
    return layers[-1]


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters a network's last linear layer, and what the network returns.

    Args:
        model: The network.
        images: Normalised images of shape (B, in_channels, H, W).

    Returns:
        Features of shape (B, D), logits of shape (B, C).
    """
    seen: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        hook.remove()
    return seen[0], logits
