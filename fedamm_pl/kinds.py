"""Checks for the values in a file, which are combined into a check of its whole content, and a strict JSON parser."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast, get_args, get_origin

from typing_extensions import NotRequired, get_type_hints  # in typing since Python 3.11

MAX_NUMBER, MAX_NAME, MAX_TEXT = 10**18, 1_000, 100_000
MAX_VALUES = 12_000_000
"""Maximum number of values in one file; it bounds the memory for the content before it is parsed."""

Kind = Callable[[Any], None]
"""A function that checks a value."""


class FieldError(ValueError):
    """A field has an invalid value.

    Attributes:
        said: What is wrong with it.
        steps: The path to the field, from the outside in.
    """

    def __init__(self, said: str, *steps: str) -> None:
        self.said, self.steps = said, steps
        super().__init__(f"{''.join(steps).lstrip('.') or 'its content'} {said}")


def expected(what: str, got: Any) -> FieldError:
    """Return an error that says what was expected and what was found."""
    shown = f"a list of {len(got):,}" if isinstance(got, list) else f"{got!r:.60}"
    return FieldError(f"should be {what}, got {shown}")


def inside(step: str, kind: Kind, value: Any) -> None:
    """Check a part of a value; an error names the part."""
    try:
        kind(value)
    except FieldError as error:
        raise FieldError(error.said, step, *error.steps) from None


def number(low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> Kind:
    """Return a check for a finite number."""

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise expected(f"a number from {low:g} to {high:g}", value)

    return check


def whole(high: int = MAX_NUMBER) -> Kind:
    """Return a check for a whole number of 0 or more."""

    def check(value: Any) -> None:
        if type(value) is not int or not 0 <= value <= high:
            raise expected(f"a whole number from 0 to {high:,}", value)

    return check


def text(longest: int = MAX_NAME) -> Kind:
    """Return a check for a text."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise expected(f"a text of at most {longest:,} characters", value)

    return check


def flag(value: Any) -> None:
    """Check that a value is true or false."""
    if not isinstance(value, bool):
        raise expected("true or false", value)


def nullable(kind: Kind) -> Kind:
    """Return a check that also accepts null."""
    return lambda value: None if value is None else kind(value)


def items(kind: Kind, most: int) -> Kind:
    """Return a check for a list whose items are all of one kind."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise expected(f"a list of at most {most:,}", value)
        for index, item in enumerate(value):
            try:  # the same as inside(), which would be slow here
                kind(item)
            except FieldError as error:
                raise FieldError(error.said, f"[{index}]", *error.steps) from None

    return check


def mapping(kind_of: Callable[[str], Kind], most: int) -> Kind:
    """Return a check for a mapping from names to values; the kind of a value may depend on its name."""

    def check(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise expected(f"a mapping of at most {most:,} names", value)
        for name, item in value.items():
            inside(" (a name in it)", text(), name)
            inside(f".{name}", kind_of(name), item)

    return check


def fields(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """Return a check for a mapping with known fields; other fields are ignored."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise expected("a mapping", value)
        if missing := [name for name in needed if name not in value]:
            raise FieldError(f"lacks {', '.join(missing)}")
        for name, kind in {**needed, **(optional or {})}.items():
            if name in value:
                inside(f".{name}", kind, value[name])

    return check


def described(content: type) -> Kind:
    """Return a check for a mapping that is described by a TypedDict.

    The fields of the TypedDict are annotated with their kinds; a field without a kind may hold anything.
    """
    kinds, optional = dict[str, Kind](), cast(Any, NotRequired)
    for name, hint in get_type_hints(content, include_extras=True).items():
        inner = get_args(hint)[0] if get_origin(hint) is optional else hint
        kinds[name] = next((kind for kind in get_args(inner)[1:] if get_origin(inner) is Annotated), lambda value: None)
    needed = content.__required_keys__  # type: ignore[attr-defined]
    return fields({name: kinds[name] for name in kinds if name in needed}, kinds)


def parse_json(content: str) -> Any:
    """Parse JSON as a run writes it: without NaN and infinity, and with each name once.

    Raises:
        ValueError: If it is not valid JSON of this form, or holds more values than a run has.
    """
    # a mapping takes four times the memory of a number or an empty list
    if content.count(",") + content.count("[") + 4 * content.count("{") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("it has a name twice")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(content, object_pairs_hook=once, parse_constant=constant)
