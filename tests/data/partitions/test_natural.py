"""Natural clients: whose what is, in which order they stand, and names that cannot be used."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedamm_pl.data.partitions.natural import by_client, client_order, require_name, shown_name
from tests.data.partitions.test_properties import REPEATABLE


def test_clients_stand_in_natural_order() -> None:
    assert client_order(["b10", "b9", "a", "10", "9", "b9", "1", "01", "b"]) == [
        "01",
        "1",
        "9",
        "10",
        "a",
        "b",
        "b9",
        "b10",
    ]


def test_each_client_keeps_what_is_left_of_its_own() -> None:
    owners = ["x", "y", "x", "z", "y", "x"]
    names, clients = by_client(owners, np.array([0, 2, 4, 5]))
    assert names == ["x", "y", "z"]
    assert [mine.tolist() for mine in clients] == [[0, 1, 3], [2], []]


@given(owners=st.lists(st.sampled_from(["a", "b2", "b10", "c"]), min_size=1, max_size=40), data=st.data())
@REPEATABLE
def test_natural_clients_hold_everything_that_is_theirs_and_nothing_else(
    owners: list[str], data: st.DataObject
) -> None:
    kept = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(owners)))))), dtype=np.int64)
    names, clients = by_client(owners, kept)
    assert sorted(names) == sorted(set(owners))
    assert sorted(np.concatenate(clients).tolist()) == list(range(len(kept)))
    for name, mine in zip(names, clients, strict=True):
        assert mine.dtype == np.int64
        assert (np.diff(mine) > 0).all()
        assert {owners[index] for index in kept[mine]} <= {name}


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


@given(
    names=st.sets(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(composed).filter(str.strip), min_size=1
    )
)
@REPEATABLE
def test_names_of_any_characters_have_an_order(names: set[str]) -> None:
    order = client_order(sorted(names))
    assert set(order) == names
    assert client_order(sorted(names, reverse=True)) == order


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name of the client of training example 2 not to be empty, got ''"),
        ("\t", r"not to be empty, got '\\t'"),
        (7, "the client of training example 2 to be a text, got 7"),
        (None, "the client of training example 2 to be a text, got None"),
        (float("nan"), "to be a text, got nan"),
        ("x" * 300, "to have at most 200 characters, got 300"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_its_example(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_client(["a", "b", name, "a"], np.arange(4))


def test_names_that_look_alike_are_not_two_clients() -> None:
    with pytest.raises(
        ValueError, match=r"of training examples to differ, got 'Lie.+ge' with its accents encoded in two ways"
    ):
        by_client(["Li\u00e8ge", "Lie\u0300ge", "Gent"], np.arange(3))


def test_names_are_shown_in_a_few_characters() -> None:
    require_name("x" * 200, "nobody")
    assert shown_name("12") == "12"
    assert shown_name("site 12") == "'site 12'"
    assert shown_name("٣") == "'٣'"
    assert shown_name("x" * 200) == f"'{'x' * 39}…'"
    assert shown_name("a\nb\x1b") == r"'a\nb\x1b'"
