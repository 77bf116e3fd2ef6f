"""Lets several clients share one module: separates their attributes, and detects what else their hooks change."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedamm_pl.protocol.messages import Broadcast, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.seeding import drawing_from

Outcome = TypeVar("Outcome")


class Differing:
    """Placeholder for a value that differs between clients that train as one program; using it raises an error.

    Args:
        name: Name of the value, for the error message.
    """

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_Differing__name", name)  # a name that other code does not ask for

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Refuse any operation of a tensor with the placeholder."""
        raise next(AttributeError(str(value)) for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))

    def __str__(self) -> str:
        """Return the error message."""
        return f"{self.__name} is not the same for all clients; a buffer of the module may differ"

    def __getattr__(self, _: str) -> Any:
        raise AttributeError(str(self))


def _refuse(self: Differing, *_: object) -> Any:
    return getattr(self, "")


_SPECIAL = (
    "bool eq ne lt le gt ge iter len call getitem contains float int index hash setattr neg pow "
    "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul"
)
for _name in _SPECIAL.split():
    setattr(Differing, f"__{_name}__", _refuse)


@dataclass(frozen=True)
class CommonSession:
    """The part of their sessions that clients which train as one program have in common."""

    broadcast: Broadcast
    payload: State

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"session.{name} is not the same for all clients; a buffer of the module may differ")


class Isolation:
    """Gives each client the module in the state that the server sent, and detects what the client's hooks change in it.

    Args:
        module: The module. Entries that the server does not send must already have their initial values.
    """

    def __init__(self, module: FederatedModule) -> None:
        self.module = module
        kind, hooks = type(module), ("survey", "question", "take_answer", "questions", "on_train_start")
        # a method without hooks before the local steps cannot change anything
        self._watches = bool(module.personal) or any(
            getattr(kind, name) is not getattr(FederatedModule, name) for name in hooks
        )
        self._own = {
            name: value.detach().clone() for name, value in self._tensors() if not name.startswith(module.shared)
        }

    def begin(self, payload: State) -> None:
        """Load the broadcast state, set training mode, and remember the module as it is then."""
        module = self.module
        module.load_shared_state(payload)
        module.train()
        self._sent = payload
        self._hparams = dict(module.hparams)
        self.attributes = self.taken()
        self._trained = [value.requires_grad for _, value in self._tensors()]

    def taken(self) -> dict[str, Any]:
        """Return the module's current attributes and buffers; submodules and parameters stay shared."""
        return {**vars(self.module), "_buffers": dict(self.module._buffers)}

    def give(self, attributes: Mapping[str, Any]) -> None:
        """Set the module's attributes to what :meth:`taken` returned."""
        vars(self.module).clear()
        vars(self.module).update(attributes, _buffers=dict(attributes["_buffers"]))

    def restore(self) -> str | None:
        """Undo what a client's hooks have changed.

        Returns:
            A change that would affect other clients: the name of an entry, or ``an option``; None if there is none.
        """
        module, changed = self.module, None
        self.give(self.attributes)
        if not _same(self._hparams, dict(module.hparams)):
            module.hparams.clear()
            module.hparams.update(self._hparams)
            changed = "an option"
        tensors = self._tensors() if self._watches else []
        for (name, value), trained in zip(tensors, self._trained, strict=False):
            if value.requires_grad != trained:
                value.requires_grad_(trained)
                changed = name
        held = {name: value.detach() for name, value in tensors if name in self._sent or name in self._own}
        references = {name: self._sent[name] if name in self._sent else self._own[name] for name in held}
        # values are compared, because writing through `.data` does not increase a tensor's version
        differ = [(value != references[name].to(value.device)).any() for name, value in held.items()]
        for name, other in zip(held, torch.stack(differ).tolist() if differ else [], strict=True):
            if other:
                held[name].copy_(references[name])
                if not name.startswith(module.personal or ()) and "." in name:
                    changed = name
        return changed

    def common(self, attributes: Sequence[Mapping[str, Any]], broadcast: Broadcast) -> dict[str, Any]:
        """Return the attributes for clients that train as one program, with placeholders where theirs differ."""
        first = attributes[0]
        found = dict(first)
        for name in {name for own in attributes for name in own} - {"_buffers"}:
            if not all(name in own and _same(own[name], first.get(name)) for own in attributes):
                found[name] = Differing(name)
        return {**found, "session": CommonSession(broadcast, self._sent), "_trainer": Differing("trainer")}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.module.named_parameters(), *self.module.named_buffers()]


def undrawn(function: Callable[[], Outcome], device: torch.device) -> Outcome:
    """Call a function that must not draw random numbers.

    Raises:
        ValueError: If it has drawn from Python's ``random`` or NumPy; ``vmap`` itself refuses draws from torch.
    """
    found = []
    for call in (None, function):
        with drawing_from(0, device):
            outcome = call() if call is not None else None
            found.append((random.random(), np.random.random()))  # noqa: NPY002  what a network may use
    if found[0] != found[1]:
        raise ValueError("its network draws random numbers while it trains, by Python's random or NumPy")
    assert outcome is not None
    return outcome


def _same(one: Any, other: Any) -> bool:
    """Return whether two attributes are equal, even if they are not the same object."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str | bytes | frozenset | set) and bool(one == other)
