"""What a list of examples becomes: every example in its part or counted as left out, classes in order, shares that are kept."""

import logging
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamm_pl.data.sources.image_data import ImageData
from fedamm_pl.data.sources.listed import PARTS, Listed, data_set

REPEATABLE = settings(deadline=None, derandomize=True, database=None)


def listed(labels: list[int | str], parts: list[str] | None = None, clients: list[str] | None = None) -> Listed:
    """Examples of one feature, their number."""
    return Listed(torch.arange(len(labels)).float()[:, None], labels, parts, clients, "here", "row {}".format)


def numbers(data: ImageData, part: str) -> list[int]:
    """The numbers of the examples of a part."""
    return data.parts[part][0].flatten().int().tolist() if part in data.parts else []  # type: ignore[attr-defined]


LABELS = st.one_of(
    st.lists(st.integers(-3, 12), min_size=2, max_size=60),
    st.lists(st.sampled_from(["a", "b", "007", "7", "-0", "é", "B "]), min_size=2, max_size=60),
)


@REPEATABLE
@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 3))
def test_shares_that_are_held_out(labels: list[int | str], fraction: float, seed: int) -> None:
    kinds = Counter(str(label).strip() for label in labels)
    if max(kinds.values()) < 2:
        with pytest.raises(ValueError, match="Expected here to hold test examples, got none"):
            data_set(listed(labels), fraction, seed)
        return
    data = data_set(listed(labels), fraction, seed)
    assert sorted(numbers(data, "train") + numbers(data, "test")) == list(range(len(labels)))
    assert numbers(data, "train") == sorted(numbers(data, "train"))
    for part, (_, mine) in data.parts.items():
        assert [data.class_names[label] for label in mine.tolist()] == [
            str(labels[i]).strip() for i in numbers(data, part)
        ]
    held_out = data.test_labels.bincount(minlength=len(kinds))
    for name, count in zip(data.class_names, held_out.tolist(), strict=True):
        assert count == (min(max(round(fraction * kinds[name]), 1), kinds[name] - 1) if kinds[name] > 1 else 0)
    again = data_set(listed(labels), fraction, seed)
    assert numbers(again, "test") == numbers(data, "test")


@REPEATABLE
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(sorted(PARTS))), min_size=1, max_size=40))
def test_parts_as_the_file_says(rows: list[tuple[str, str]]) -> None:
    labels, parts = [label for label, _ in rows], [PARTS[part] for _, part in rows]
    known = {label for label, part in zip(labels, parts, strict=True) if part == "train"}
    there = {part for label, part in zip(labels, parts, strict=True) if label in known}
    if "test" in parts and not {"train", "test"} <= there:
        with pytest.raises(ValueError, match=r"Expected here to hold (train|test) examples, got none"):
            data_set(listed([*labels], [part.upper() for _, part in rows]), 0.5, 0)
        return
    if "test" not in parts:
        return
    data = data_set(listed([*labels], [part.upper() for _, part in rows], [f"c{i}" for i in range(len(rows))]), 0.5, 0)
    assert data.class_names == sorted(known)
    for part in ("train", "val", "test"):
        assert numbers(data, part) == [i for i, label in enumerate(labels) if parts[i] == part and label in known]
    assert data.clients == [f"c{i}" for i in numbers(data, "train")]


def test_whole_numbers_are_ordered_by_size_and_texts_by_alphabet() -> None:
    assert data_set(listed([10, 9, 100] * 2), 0.5, 0).class_names == ["9", "10", "100"]
    assert data_set(listed(["10", "9", "100"] * 2), 0.5, 0).class_names == ["9", "10", "100"]
    assert data_set(listed(["10", "9", "010"] * 2), 0.5, 0).class_names == ["010", "10", "9"]


def test_another_seed_draws_others() -> None:
    draws = {tuple(numbers(data_set(listed([0] * 30), 0.5, seed), "test")) for seed in range(4)}
    assert len(draws) == 4


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="to hold test examples, got none of a class that has training examples"):
        data_set(listed([*"aabcb"], ["train", "train", "test", "val", "test"]), 0.5, 0)
    assert "here: 2 of 2 test examples are left out, since their classes have no training examples: b" in caplog.text
    assert "here: 1 of 1 val examples are left out" in caplog.text
    data_set(listed([*"aabcc"]), 0.2, 0)
    assert (
        "2 of 5 examples, 20 % of each class, are held out for testing; classes of one example have none for testing: b"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("labels", "parts", "clients", "said"),
    [
        ([], None, None, "Expected here to hold examples, got none"),
        (["a", " "], None, None, "Expected every label in here to be given, got none in row 1"),
        (["a", "a"], ["train", "?"], None, r"Expected every split in here to be train, val or test, got '\?' in row 1"),
        (["a", "a"], ["train", ""], None, "got '' in row 1"),
        (
            ["a", "a"],
            ["train", "test"],
            ["", "k"],
            "Expected every client of a training example in here to be given, got none in row 0",
        ),
        (["a", "a"], ["test", "test"], None, "Expected here to hold train examples, got none"),
    ],
)
def test_mistakes(labels: list[int | str], parts: list[str] | None, clients: list[str] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data_set(listed(labels, parts, clients), 0.5, 0)


def test_a_label_that_only_the_test_set_has_does_not_renumber_the_classes(caplog: pytest.LogCaptureFixture) -> None:
    labels: list[int | str] = [*map(str, range(1, 13)), "2", "unknown", "20"]
    data = data_set(listed(labels, ["train"] * 12 + ["test"] * 3), 0.2, 0)
    assert data.class_names == [str(number) for number in range(1, 13)]
    assert data.test_labels.tolist() == [1]
    assert (
        "2 of 3 test examples are left out, since their classes have no training examples: 20, unknown" in caplog.text
    )


def test_clients_that_the_draw_of_the_test_set_leaves_without_examples_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels: list[int | str] = ["a", "b"] * 20
    clients = ["large"] * 30 + [f"site {i}" for i in range(10)]
    data = data_set(listed(labels, None, clients), 0.5, 1)
    assert data.clients is not None
    lost = [name for name in clients[30:] if name not in data.clients]
    assert lost
    assert (
        f"{len(lost)} of 11 clients take no part, since all their examples are held out for testing: {lost[0]}"
        in caplog.text
    )
