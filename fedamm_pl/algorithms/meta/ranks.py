"""Communication between the processes (ranks) of a DDP training: sums, and the values of all ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def summed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the sums over all ranks, detached. All ranks must pass tensors of the same shapes in the same order."""
    sums = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    for value in sums:
        distributed.all_reduce(torch.view_as_real(value) if value.is_complex() else value)
    return sums


def gathered(values: Tensor) -> tuple[Tensor, slice]:
    """Collect the values of all ranks.

    Args:
        values: The values of this rank, shape (n,); n may differ from rank to rank.

    Returns:
        The values of all ranks in the order of the ranks, detached, and the slice with this rank's values.
    """
    mine = torch.zeros(distributed.get_world_size(), dtype=torch.int64, device=values.device)
    rank = distributed.get_rank()
    mine[rank] = len(values)
    counts = summed([mine])[0].tolist()
    place = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    joint = values.new_zeros(sum(counts))
    joint[place] = values.detach()
    return summed([joint])[0], place
