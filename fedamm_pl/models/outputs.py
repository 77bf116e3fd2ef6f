"""Outputs of networks: the logits, however they are wrapped, and the linear layer and features that they come from."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Call = tuple[nn.Module, Tensor, Tensor]
"""A linear layer, its input and its output."""


def logits_of(output: Any) -> Tensor:
    """Return the logits from a network's output.

    Args:
        output: A tensor; an object with ``logits`` or a dict with that key; or a tuple, list, dict or similar object
            with exactly one entry that is a floating-point tensor of two dimensions.

    Raises:
        ValueError: If it is none of these, or it is not clear which entry is meant.

    Example:
        >>> import torch
        >>> logits_of({"loss": None, "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    parts = list(output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ())
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = [named] if named is not None else [part for part in parts if _could_be_logits(part)]
    if len(found) == 1 and isinstance(found[0], Tensor):
        return found[0]
    raise ValueError(
        "Expected `model` to return logits of shape (B, C), or an object that has them as `logits`, or a tuple or dict with "
        f"one entry like that, got {type(output).__name__}{f' of {_described(parts)}' if parts else ''}."
    )


def _could_be_logits(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and part.ndim == 2


def _described(parts: list[Any]) -> str:
    shown = (
        f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
        if isinstance(part, Tensor)
        else type(part).__name__
        for part in parts[:5]
    )
    return ", ".join(shown) + (", ..." if len(parts) > 5 else "")


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the linear layer that gives a network's logits, and the logits.

    Args:
        model: The network.
        images: Normalised images of shape (B, in_channels, H, W).

    Returns:
        Features of shape (B, D), logits of shape (B, C).

    Raises:
        ValueError: If no linear layer gives the logits.
    """
    (_, features, logits), _ = last_linear_call(model, images)
    return features, logits


def inputs_of(part: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """Return the input of a part of a network in a forward pass; for a custom head these are the features.

    Args:
        part: A part that takes one tensor; if it is called several times, the last call counts.
        model: The network.
        images: Normalised images of shape (B, in_channels, H, W).
    """
    entered: list[Tensor] = []
    handle = part.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return entered[-1]


def last_linear_call(model: nn.Module, images: Tensor) -> tuple[Call, int]:
    """Return the call of the linear layer that gives a network's logits, and how often the layer was called.

    Raises:
        ValueError: If no linear layer gives the logits.
    """
    calls: list[Call] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if output.ndim == 2:
            calls.append((layer, inputs[0] if inputs else named["input"], output))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        logits = logits_of(model(images))
    finally:
        for handle in handles:
            handle.remove()
    found = [call for call in calls if _is_same(call[2], logits)]
    if not found:
        names = ", ".join(
            dict.fromkeys(name for name, part in model.named_modules() for call in calls if part is call[0])
        )
        raise ValueError(
            f"Expected `model` to return the output of a linear layer, got {type(model).__name__}, whose logits "
            + (
                f"are computed from it or come from elsewhere (its linear layers: {names})."
                if names
                else "come without one."
            )
        )
    layer, features, _ = found[-1]
    return (layer, features, logits), sum(call[0] is layer for call in calls)


def _is_same(output: Tensor, logits: Tensor) -> bool:
    """Return whether both tensors have the same memory and shape, for example as views."""
    return output is logits or (output.data_ptr() == logits.data_ptr() != 0 and output.shape == logits.shape)
