"""The precision in which what must not be rounded is computed, whatever the model's own is."""

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Return numbers in float32, or as they are if that is better."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
