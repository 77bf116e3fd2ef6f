"""Batches of several clients in one tensor: padding to the same size, and BatchNorm that ignores the padding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.data.client import Batch


def padded(batches: Sequence[Batch | None]) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    """Put the batches of several clients into one tensor.

    Args:
        batches: The batch of each client; None for a client without one.

    Returns:
        Images (G, B, ...), labels (G, B), which examples are not padding (G, B) or None if there is no padding, and the
        number of examples of each client. Padding is a copy of the client's first example, so its values are in range.
    """
    found = [batch for batch in batches if batch is not None]
    like_images, like_labels = found[0] if found else (torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64))
    if kinds := {(images.dtype, images.shape[1:]) for images, _ in found[1:]} - {
        (like_images.dtype, like_images.shape[1:])
    }:
        raise ValueError(f"clients have images of different type or shape: {kinds}")
    sizes = [0 if batch is None else len(batch[1]) for batch in batches]
    most = max(1, *sizes)
    if min(sizes) == most:
        images, labels = (torch.stack(parts) for parts in zip(*found, strict=True))
        return images, labels, None, sizes
    images = like_images.new_zeros(len(batches), most, *like_images.shape[1:])
    labels = like_labels.new_zeros(len(batches), most)
    for place, batch in enumerate(batches):
        if batch is not None:
            for whole, part in zip((images, labels), batch, strict=True):
                whole[place, : len(part)] = part
                whole[place, len(part) :] = part[0]
    present = torch.arange(most) < torch.tensor(sizes)[:, None]
    return images, labels, present.to(images.device), sizes


@dataclass
class Mask:
    """Input and output of the masked BatchNorm layers in a step.

    Attributes:
        present: Which examples of the batch are not padding, shape (B,); None: all.
        moved: Running statistics of the layers after the step, by their names in the network.
    """

    present: Tensor | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def masked_batch_norm(model: nn.Module) -> Iterator[Mask]:
    """Let BatchNorm layers in training mode ignore padding, and yield the mask, which gets their running statistics.

    torch's own layers update their running statistics in place, and count every example.
    """
    mask, layers = Mask(), [(name, part) for name, part in model.named_modules() if type(part) in BATCH_NORMS]
    for name, layer in layers:
        layer.forward = _Masked(name, layer, mask)
    try:
        yield mask
    finally:
        for _, layer in layers:
            del layer.forward


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class _Masked:
    """Forward pass of a BatchNorm layer that ignores padding."""

    name: str
    layer: Any
    mask: Mask

    def __call__(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (B, C, ...)."""
        layer = self.layer
        if not layer.training and layer.running_mean is not None:
            return cast(Tensor, type(layer).forward(layer, inputs))
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        dims = [0, *range(2, inputs.ndim)]
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        moves = layer.training and layer.running_mean is not None
        if self.mask.present is None:
            if moves:
                variance, mean = torch.var_mean(wide.detach(), dims)
                self._move(mean, variance)
            return functional.batch_norm(inputs, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        weight = self.mask.present.to(wide.dtype).reshape(-1, *[1] * (inputs.ndim - 1))
        count = weight.sum() * (inputs.numel() // (inputs.shape[0] * inputs.shape[1]))
        mean = (wide * weight).sum(dims) / count
        centred = wide - mean.reshape(shape)
        variance = (centred.square() * weight).sum(dims) / count
        if moves:
            self._move(mean.detach(), variance.detach() * (count / (count - 1)))
        scaled = centred * (variance + layer.eps).rsqrt().reshape(shape)
        if layer.affine:
            scaled = scaled * layer.weight.to(wide.dtype).reshape(shape) + layer.bias.to(wide.dtype).reshape(shape)
        return cast(Tensor, scaled.to(inputs.dtype))

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        layer, prefix = self.layer, f"{self.name}." if self.name else ""
        moved = self.mask.moved  # may hold statistics from an earlier call in the same step

        def now(name: str) -> Tensor:
            return cast(Tensor, moved.get(prefix + name, getattr(layer, name)))

        seen = now("num_batches_tracked") + 1
        share = 1 / seen if layer.momentum is None else layer.momentum
        found = {"num_batches_tracked": seen}
        for name, new in (("running_mean", mean), ("running_var", variance)):
            found[name] = now(name) + share * (new.to(now(name)) - now(name))
        moved |= {prefix + name: value for name, value in found.items()}
