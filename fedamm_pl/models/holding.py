"""A network that holds other parameters and buffers for the time of a call."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.func import functional_call

Outcome = TypeVar("Outcome")


class _Holding(nn.Module):
    """Calls a function, so that ``functional_call`` swaps the tensors for all the time of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Outcome]) -> Outcome:
        return function()


def holding(module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[], Outcome]) -> Outcome:
    """Call a function while a module holds other parameters and buffers; afterwards it has its own again.

    A backward pass belongs into the function: where blocks are checkpointed it runs the network again.

    Args:
        module: The module; a part may be in it under several names, and a tensor in several parts.
        tensors: What it holds, by the names of ``named_parameters`` and ``named_buffers``.
        function: What to call.
    """
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    # each place once: functional_call would leave its own tensor in a part that it finds under two names
    held = {
        f"module.{prefix}{'.' if prefix else ''}{own}": tensors[name]
        for prefix, part in module.named_modules()
        for own, value in (*part._parameters.items(), *part._buffers.items())
        if value is not None and (name := names[id(value)]) in tensors
    }
    outcome: Outcome = functional_call(_Holding(module), held, (function,), tie_weights=False)
    return outcome
