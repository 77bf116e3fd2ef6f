"""Networks by name: they are found, called according to their signature, and their errors are reported in one line."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from fedamm_pl.foreign import failure, imported
from fedamm_pl.models.names import NAMES, registered, suggestion

KNOWN = f"Expected `model` to be one of {NAMES}, or an import path of a callable(num_classes, in_channels)"
TAKEN = ("weights", "pretrained")
"""Parameters that must not receive the number of classes, which would request weights from the network."""


_trusted: ContextVar[Collection[str] | None] = ContextVar("names that may be imported, None for all", default=None)


@contextmanager
def registered_only(trusted: Collection[str] | None = ()) -> Iterator[None]:
    """Let :func:`build_model` import only these names, while a module is built from a file; None allows all."""
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def build_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Build a network by name.

    The builder gets ``num_classes`` and ``in_channels`` by keyword if its signature has these names, and
    ``num_classes`` also if it takes ``**kwargs`` as torchvision's builders do; otherwise it gets them by position.
    Weights are never requested.

    Args:
        name: A name that :func:`fedamm_pl.models.registered` knows, or the import path of a callable(num_classes, in_channels) ->
            Module.
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.

    Returns:
        The network, freshly initialised from torch's global random state.

    Raises:
        ValueError: If there is no such name, the callable cannot be called like this, raises, or does not return a
            network.
    """
    own = registered(name)
    build = own or _imported(name)
    try:
        words, named = _arguments(build, num_classes, in_channels)
    except TypeError as error:
        raise ValueError(f"{KNOWN}, got {name!r}, which cannot be called like this ({error}).") from error
    try:
        model = build(*words, **named)
    except Exception as error:  # any error of the builder's code
        if own and isinstance(error, ValueError):
            raise
        raise ValueError(
            f"Expected `model` to build a network, got {name!r}, which raises {failure(error)}."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{KNOWN}, got {name!r}, which returned {type(model).__name__}.")
    return model


def _imported(name: str) -> Callable[..., Any]:
    trusted = _trusted.get()
    if trusted is not None and name not in trusted:
        raise ValueError(f"{KNOWN} that is trusted, got {name!r:.80} from a file.")
    if "." not in name:
        raise ValueError(f"{KNOWN}, got {name!r}{suggestion(name)}")
    return imported(name, KNOWN)


def _arguments(build: Callable[..., Any], num_classes: int, in_channels: int) -> tuple[list[int], dict[str, int]]:
    """Return the positional and the keyword arguments for a network's builder.

    Raises:
        TypeError: If it cannot be called with the number of classes.
    """
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):  # builtins may have none
        return [num_classes, in_channels], {}
    parameters = signature.parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    by_name = [
        name for name, found in parameters.items() if found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)
    ]
    required = [found for found in parameters.values() if found.default is found.empty and found.name in by_name]
    words, named = [], {"in_channels": in_channels} if "in_channels" in by_name else {}
    takes_any_name = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    if "num_classes" in by_name or (takes_any_name and not required):
        named["num_classes"] = num_classes
    else:
        words = [num_classes] if named else [num_classes, in_channels]
    bound = signature.bind(*words, **named)
    if taken := [name for name in TAKEN if name in bound.arguments]:
        raise TypeError(f"its signature has no num_classes, which would be taken for {taken[0]}")
    return words, named
