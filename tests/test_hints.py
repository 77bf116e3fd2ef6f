"""Values against the types that stand in signatures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, TypedDict

import pytest

from fedamm_pl.hints import fits, option_types, shown


class Info(TypedDict, total=False):
    size: list[int]
    groups: dict[str, list[int]]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (0.5, float),
        (True, bool),
        ("a", str),
        (None, None),
        (None, int | None),
        (None, Optional[str]),  # noqa: UP045  as older code has it
        ("a", Literal["a", "b"]),
        ([1, 2], list[int]),
        ((1, 2), list[int]),
        ([1, 2], tuple[int, int]),
        ([1, 2, 3], tuple[int, ...]),
        ([], Sequence[str]),
        ({"a": (0, 1)}, dict[str, tuple[int, int]]),
        ({"a": 1}, Mapping[str, float]),
        ({"size": [1]}, Info),
        ({}, Info),
        ({"anything": [object()]}, Any),
    ],
)
def test_it_fits(value: Any, hint: Any) -> None:
    assert fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1.0, int),
        ("1", int),
        (True, float),
        (math.nan, float),
        (math.inf, float),
        (math.nan, Any),
        (1, bool),
        (None, str),
        ("", int | None),
        ("c", Literal["a", "b"]),
        (True, Literal[1]),
        ([1, "a"], list[int]),
        ({1}, list[int]),
        ("ab", list[str]),
        ([1, 2, 3], tuple[int, int]),
        ({"a": [0]}, dict[str, tuple[int, int]]),
        ({1: 1}, Mapping[str, int]),
        ({"size": ["1"]}, Info),
        ({"more": 1}, Info),
        ([], Info),
    ],
)
def test_it_does_not_fit(value: Any, hint: Any) -> None:
    assert not fits(value, hint)


def test_numbers_may_be_allowed_to_be_infinite() -> None:
    assert fits({"loss": math.nan}, dict[str, float], finite=False)
    assert not fits({"loss": "nan"}, dict[str, float], finite=False)


def test_a_list_that_holds_itself_or_another_many_times_ends() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert not fits(endless, list[int])
    shared = [0] * 1000
    for _ in range(3):
        shared = [shared] * 1000
    assert fits(shared, list[list[list[list[int]]]])
    assert not fits([["a"], ["a"]], list[list[int]] | list[list[float]])


def test_options_are_those_of_the_class_and_of_those_that_it_passes_names_on_to() -> None:
    class Base:
        def __init__(self, lr: float, name: str = "") -> None: ...

    class Own(Base):
        def __init__(self, *args: Any, lr: int = 1, more=None, **kwargs: Any) -> None: ...  # type: ignore[no-untyped-def]

    class Closed(Base):
        def __init__(self, size: int) -> None: ...

    assert option_types(Own) == ({"lr": int, "more": Any, "name": str}, False)
    assert option_types(Closed) == ({"size": int}, False)


@pytest.mark.parametrize(
    ("hint", "text"), [(float, "float"), (Literal["a", "b"], "a or b"), (int | None, "int | None"), (Info, "Info")]
)
def test_types_are_shown_as_one_writes_them(hint: Any, text: str) -> None:
    assert shown(hint) == text
