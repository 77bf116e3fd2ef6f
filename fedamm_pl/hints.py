"""Check values, for example from a file, against the types in a signature, and find the name meant by a misspelling."""

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def option_types(kind: type) -> tuple[dict[str, Any], bool]:
    """Return the types of a class's options, including those passed to its bases, and whether it accepts any name."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if (init := vars(base).get("__init__")) is None:
            continue
        try:
            hints = get_type_hints(init)
        except (NameError, TypeError):  # names that are defined for type checkers only
            hints = {}
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, True


def fits(value: Any, hint: Any, finite: bool = True) -> bool:
    """Whether a value has the type given in a signature.

    A bool is not a number, and a list is accepted for any sequence.

    Args:
        value: The value.
        hint: The type.
        finite: Whether numbers must be finite.

    Example:
        >>> fits(1, float), fits(True, int), fits(float("nan"), float), fits([1, "a"], list[int])
        (True, False, False, False)
    """
    return _Fits(finite)(value, hint)


class _Fits:
    """Checks values and remembers the results: a small file may contain the same list many times, or inside itself."""

    def __init__(self, finite: bool) -> None:
        self.finite = finite
        self.seen: dict[tuple[int, str], bool] = {}

    def __call__(self, value: Any, hint: Any) -> bool:
        if not isinstance(value, list | tuple | dict):
            return self._compute(value, hint)
        key = id(value), repr(hint)
        if key not in self.seen:
            self.seen[key] = True
            self.seen[key] = self._compute(value, hint)
        return self.seen[key]

    def _compute(self, value: Any, hint: Any) -> bool:
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, UnionType):
            return any(self(value, arg) for arg in args)
        if origin is Literal:
            return any(type(value) is type(arg) and value == arg for arg in args)
        if is_typeddict(hint):
            fields = get_type_hints(hint)
            return isinstance(value, dict) and all(
                name in fields and self(part, fields[name]) for name, part in value.items()
            )
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return isinstance(value, dict) and all(
                self(key, args[0]) and self(part, args[1]) for key, part in value.items()
            )
        if origin is tuple and ... not in args:
            return isinstance(value, list | tuple) and len(value) == len(args) and all(map(self, value, args))
        if origin is not None and args:
            return isinstance(value, list | tuple) and all(self(part, args[0]) for part in value)
        if hint is float or (hint is Any and type(value) is float):
            return type(value) in (int, float) and (not self.finite or -math.inf < value < math.inf)
        if hint is Any:
            return True
        if hint in (None, NoneType):
            return value is None
        return not isinstance(hint, type) or (isinstance(value, hint) and (hint is bool or type(value) is not bool))


def shown(hint: Any) -> str:
    """Return a type as it is written in messages."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return re.sub(r"\b(\w+\.)+(?=\w)", "", str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint)))


def similar(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to the given one, ignoring case, or None.

    Example:
        >>> similar("fedamm", ["FedAvg", "FedAMM"]), similar("x", ["FedAvg"])
        ('FedAMM', None)
    """
    spelt = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), spelt, 1)
    return spelt[close[0]] if close else None
