"""The precision of computations that must not be rounded, whatever the precision of the model."""

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if it is more precise."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
