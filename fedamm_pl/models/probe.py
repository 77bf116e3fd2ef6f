"""Properties of a network that are found by running it, on a copy or before its state is used."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedamm_pl.foreign import failure
from fedamm_pl.models.outputs import last_linear_call
from fedamm_pl.seeding import drawing_from

ResultT = TypeVar("ResultT")
NetworkT = TypeVar("NetworkT", bound=nn.Module)


def deep_copy(network: NetworkT, memo: dict[int, Any] | None = None) -> NetworkT:
    """Copy a network, even if it stores tensors that a forward pass has computed, as ``spectral_norm`` does.

    Args:
        network: The network, or a module that contains it.
        memo: Copies that are to be used for parts, by the ``id`` of the part.

    Raises:
        ValueError: If it holds something that cannot be copied, for example an open file.
    """
    computed = {
        id(value): value.detach().clone()
        for part in network.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(network, {**computed, **(memo or {})})
    except Exception as error:  # whatever its parts raise
        raise ValueError(
            f"Expected {type(network).__name__} to be a module that can be copied, got one that raises {failure(error)}."
        ) from error


def attempt(call: Callable[[], ResultT], images: Tensor, name: str, verb: str = "take") -> ResultT:
    """Return the result of a call to a user's network, and raise a clear error if the call fails.

    Args:
        call: Calls the network.
        images: The images (B, in_channels, H, W) or features (B, D) of the call, for the message.
        name: Name of the network in messages.
        verb: What the network is expected to do with them, for the message.

    Raises:
        ValueError: If the call raises any exception.
    """
    try:
        return call()
    except Exception as error:
        features = images.ndim == 2
        kind = "features of shape" if features else "images of shape"
        axes, hint = ("", "; mlp and mlp-256-128 do") if features else (" (channels, height, width)", "")
        raise ValueError(
            f"Expected `model` to {verb} {kind} {tuple(images.shape[1:])}{axes}, got {name}, which raises {failure(error)}{hint}."
        ) from error


def complete_lazy_layers(model: nn.Module, image: Tensor | None) -> None:
    """Initialise layers that take their sizes from the first images, before their state is copied.

    Args:
        model: The network; nothing happens if it has no such layers.
        image: An input of shape (1, in_channels, H, W) or (1, D), or None if the shape is not known.

    Raises:
        ValueError: If the shape is not known, or the network does not take the input.
    """
    lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]
    if not lazy:
        return
    if image is None:
        raise ValueError(
            "Expected `info` to hold image_size for a network with lazy layers ([] if it takes features), got none: call the "
            f"network once first, since the size of {lazy[0]} follows from what it takes."
        )
    modes = [(part, part.training) for part in model.modules()]
    with torch.no_grad():
        attempt(lambda: model.eval()(image), image, type(model).__name__)
    for part, mode in modes:
        part.training = mode


def classifier_of(model: nn.Module, image: Tensor | None, num_classes: int) -> str:
    """Return the name of the linear layer that gives a network's logits, found by a forward pass on a copy.

    Args:
        model: The network.
        image: An input of shape (1, in_channels, H, W) or (1, D). None if the shape is not known: then the layer must
            be the last that the network registered, and the only one with as many outputs as classes.
        num_classes: Number of classes C.

    Raises:
        ValueError: If no linear layer gives the logits, it is not clear which one does, or the layer or its weights
            are used elsewhere, too.
    """
    network = type(model).__name__
    if image is None:
        layers = [(name, part.out_features) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        if not layers:
            raise ValueError(f"Expected `model` to end in a linear layer, got {network} without any.")
        able = [name for name, size in layers if size == num_classes]
        if len(able) != 1 or able[0] != layers[-1][0]:
            raise ValueError(
                f"Expected `info` to hold image_size, which shows what layer of {network} gives its logits, got none, and "
                f"{len(able)} linear layers with {num_classes} outputs among {len(layers)}."
            )
        return str(able[0])
    probe = deep_copy(model).eval()
    with torch.no_grad(), drawing_from(0, image.device):
        attempt(lambda: probe(image), image, network)
        (layer, *_), times = last_linear_call(probe, image)
    (name, *others) = (name for name, part in probe.named_modules(remove_duplicate=False) if part is layer)
    own = {id(value) for value in layer.parameters()}
    shared = [entry for entry, value in probe.named_parameters(remove_duplicate=False) if id(value) in own]
    if times > 1 or others or len(shared) > len(own):
        raise ValueError(
            f"Expected `model` to use the linear layer that gives its logits for nothing else, got {network}, which uses "
            f"{name or 'itself'} {'more than once' if times > 1 else 'under other names too: ' + ', '.join(others or shared)}."
        )
    return str(name)
