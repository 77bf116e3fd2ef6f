"""A partition by the user's own function: called as promised, and whatever it does wrong said in one line."""

from typing import Any

import numpy as np
import pytest

from fedamm_pl.data.partitions.own import own_partition

KNOWN = "Expected `partition` to be this or that"
LABELS = np.array([0, 0, 1, 1, 2, 2, 0, 1])
Rng = np.random.Generator


def evens_and_odds(labels: np.ndarray, num_clients: int, rng: Rng) -> list[Any]:
    order = rng.permutation(len(labels))
    labels[:] = 0  # it has a copy
    return [order[client::num_clients] for client in range(num_clients)]


def lists_and_arrays(labels: np.ndarray, num_clients: int, rng: Rng) -> list[Any]:
    return [[4, 2], np.array([], dtype=float), np.array([7, 0], dtype=np.uint8)]


def other_source(labels: np.ndarray, num_clients: int, rng: Rng) -> list[Any]:
    return evens_and_odds(labels, num_clients, np.random.default_rng())


def raising(labels: np.ndarray, num_clients: int, rng: Rng) -> list[Any]:
    raise KeyError("no such\nclass")


def with_one_argument(labels: np.ndarray) -> list[Any]:
    return []


def returning(value: Any) -> Any:
    return lambda labels, num_clients, rng: value


nothing = returning(None)
two = returning([[0], [1]])
fractions = returning([[0.0, 1.0], [2], [3]])
flags = returning([[True] * 8, [2], [3]])
nested = returning([[[0, 1]], [2], [3]])
texts = returning(["ab", "cd", "ef"])
mapping = returning({0: [0], 1: [1], 2: [2]})
ragged = returning([[0, [1]], [2], [3]])
too_large = returning([[0], [1], [2, 8]])
negative = returning([[0], [1], [-1]])
twice = returning([[0], [3, 1, 3], [2]])
shared = returning([[0], [3, 1], [2, 3]])
empty = returning([[], [], []])
data = 5


def call(function: str, num_clients: int = 3) -> list[np.ndarray]:
    return own_partition(f"{__name__}.{function}", KNOWN, LABELS, num_clients, lambda: np.random.default_rng(0))


def test_what_it_returns_is_the_partition() -> None:
    expected = np.random.default_rng(0).permutation(8)
    assert [mine.tolist() for mine in call("evens_and_odds")] == [sorted(expected[k::3].tolist()) for k in range(3)]
    assert LABELS.tolist() == [0, 0, 1, 1, 2, 2, 0, 1]
    clients = call("lists_and_arrays")
    assert [mine.tolist() for mine in clients] == [[2, 4], [], [0, 7]]
    assert {mine.dtype for mine in clients} == {np.dtype(np.int64)}


RETURNS = "_partition.{} to return"
WRONG = {
    "raising": r"_own.raising\(labels, num_clients, rng\) to return the indices of each client, got KeyError: "
    r"'no such\\nclass' \(.*test_own.py:\d+\)\.",
    "with_one_argument": "to return the indices of each client, got TypeError: .* takes 1 positional argument but 3",
    "nothing": "to return the indices of each client, got TypeError: 'NoneType' object is not iterable",
    "two": "two to return 3 arrays of indices, one per client, got 2",
    "fractions": r"whole numbers in one dimension for client 0, got an array of float64 of shape \(2,\)",
    "flags": "whole numbers in one dimension for client 0, got an array of bool",
    "nested": r"whole numbers in one dimension for client 0, got an array of int64 of shape \(1, 2\)",
    "texts": "whole numbers in one dimension for client 0, got an array of <U2",
    "mapping": r"whole numbers in one dimension for client 0, got an array of int64 of shape \(\)",
    "ragged": "got ValueError: setting an array element with a sequence",
    "too_large": "too_large to return indices from 0 to 7, got 8 for client 2",
    "negative": "negative to return indices from 0 to 7, got -1 for client 2",
    "twice": "twice to return each example once, got 3 twice for client 1",
    "shared": "shared to return each example once, got 3 for client 1 and for client 2",
    "empty": "empty to return indices of training examples, got none for any client",
    "other_source": "other_source to return the same partition .*, got two different ones: draw only from the generator that it is given",
    "data": "Expected `partition` to be this or that, got '.*data', which cannot be called like this",
    "absent": "Expected `partition` to be this or that, got '.*absent' .*has no attribute 'absent'",
}


@pytest.mark.parametrize("function", WRONG)
def test_whatever_is_wrong_is_said_in_one_line(function: str) -> None:
    with pytest.raises(ValueError, match=WRONG[function]) as caught:
        call(function)
    assert "\n" not in str(caught.value)


def test_the_number_of_clients_is_checked_before() -> None:
    with pytest.raises(ValueError, match="`num_clients` to be 1 or more, got 0"):
        call("raising", 0)
