"""Calls during which a network holds other parameters and buffers."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.func import functional_call

Outcome = TypeVar("Outcome")


class _Holding(nn.Module):
    """Calls a function in its forward pass, so that ``functional_call`` swaps the tensors during the whole call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Outcome]) -> Outcome:
        return function()


def holding(module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[], Outcome]) -> Outcome:
    """Call a function while a module holds other parameters and buffers; its own ones are restored afterwards.

    Run backward passes within the function, too: with checkpointed blocks they run the network again.

    Args:
        module: The module; it may contain a part under several names, and a tensor in several parts.
        tensors: The other parameters and buffers, by the names of ``named_parameters`` and ``named_buffers``.
        function: The function to call.
    """
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    # each place once: functional_call would leave the other tensor in a part that it finds under two names
    held = {
        f"module.{prefix}{'.' if prefix else ''}{own}": tensors[name]
        for prefix, part in module.named_modules()
        for own, value in (*part._parameters.items(), *part._buffers.items())
        if value is not None and (name := names[id(value)]) in tensors
    }
    outcome: Outcome = functional_call(_Holding(module), held, (function,), tie_weights=False)
    return outcome
