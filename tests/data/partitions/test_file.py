"""Partition files: what is written is read back, and what users get wrong in them is said in one line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamm_pl.data.partitions import file as partition_file
from fedamm_pl.data.partitions.file import PartitionFile, partition_json, read_partition

WHOLE: dict[str, Any] = {
    "format": 1,
    "data": "abc",
    "num_examples": 12,
    "clients": {"north": [0, 4, 5], "south 10": [3], "süd": []},
    "meta": [9, 2],
    "validation": [7],
    "local_test": {"north": [8]},
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "partition.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    found = read_partition(written(tmp_path, WHOLE))
    assert {name: mine.tolist() for name, mine in found.clients.items()} == WHOLE["clients"]
    assert list(found.clients) == ["north", "south 10", "süd"]
    assert found.meta is not None
    assert found.validation is not None
    assert found.meta.tolist() == [9, 2]  # as they stand
    assert found.validation.tolist() == [7]
    assert found.local_test["north"].tolist() == [8]
    assert (found.num_examples, found.content) == (12, "abc")
    found.require_data(12, "abc")


def test_what_is_written_is_read_to_the_same(tmp_path: Path) -> None:
    content = partition_json(read_partition(written(tmp_path, WHOLE)))
    assert json.loads(content) == WHOLE
    assert partition_json(read_partition(written(tmp_path, content.decode()))) == content
    plain = PartitionFile(tmp_path, {"a": np.array([1])}, num_examples=2, content="x")
    assert json.loads(partition_json(plain)) == {"format": 1, "data": "x", "num_examples": 2, "clients": {"a": [1]}}


def test_a_plain_mapping_is_read_whatever_its_clients_are_called(tmp_path: Path) -> None:
    found = read_partition(written(tmp_path, {"format": [5, 1], "clients": [3], "10": []}))
    assert {name: mine.tolist() for name, mine in found.clients.items()} == {"format": [1, 5], "clients": [3], "10": []}
    assert (found.meta, found.validation, found.num_examples, found.content) == (None, None, None, None)
    found.require_data(6, "whatever")


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert list(read_partition(written(tmp_path, '\ufeff{"a": [1]}')).clients) == ["a"]


MAPPING = "to be a mapping of each client to a list of indices, got"
WRONG: dict[str, tuple[Any, str]] = {
    "empty": ("", r"to be a file of JSON .*, got one that cannot be read \(Expecting value: line 1"),
    "no JSON": ("a,b\n1,2", "got one that cannot be read"),
    "cut off": ('{"a": [1, 2', "got one that cannot be read"),
    "nested": ("[" * 100_000, "got one that cannot be read"),
    "digits": ('{"a": [' + "9" * 5000 + "]}", "got one that cannot be read"),
    "a list": ([[1], [2]], f"{MAPPING} a list"),
    "a number": (5, f"{MAPPING} a whole number"),
    "null": (None, f"{MAPPING} nothing"),
    "no clients": ({}, f"{MAPPING} an empty mapping"),
    "a client twice": ('{"a": [1], "b": [2], "a": [3]}', "to have each name once, got 'a' twice"),
    "a client twice in a whole file": (
        '{"format": 1, "clients": {"a": [1], "a": [3]}}',
        "to have each name once, got 'a' twice",
    ),
    "an empty name": ({"a": [1], "": [2]}, r"the name of client 1 of .*partition\.json not to be empty, got ''"),
    "a blank name": ({" ": [2]}, "not to be empty, got ' '"),
    "a long name": ({"x" * 201: [2]}, "to have at most 200 characters, got 201: xxx"),
    "no list": ({"a": 3}, "to have a list of indices for client 'a', got a whole number"),
    "a mapping for a client": ({"a": {"0": 1}}, "to have a list of indices for client 'a', got a mapping"),
    "true": ({"a": [0, True]}, "to hold whole numbers from 0 up, got true for client 'a'"),
    "a fraction": ({"a": [1.0]}, "to hold whole numbers from 0 up, got 1.0 for client 'a'"),
    "a text": ({"a": ["1"]}, "to hold whole numbers from 0 up, got \"1\" for client 'a'"),
    "NaN": ('{"a": [NaN]}', "to hold whole numbers from 0 up, got NaN for client 'a'"),
    "negative": ({"b": [-1]}, "to hold whole numbers from 0 up, got -1 for client 'b'"),
    "beyond all": ({"b": [2**63]}, "to hold whole numbers from 0 up, got 9223372036854775808 for client 'b'"),
    "names that look alike": ('{"Li\u00e8ge": [1], "Lie\u0300ge": [2]}', "with its accents encoded in two ways"),
    "twice in one": ({"a": [4, 7, 4]}, "to hold each example once, got 4 twice for client 'a'"),
    "in two": ({"a": [4, 7], "b": [1, 7]}, "to hold each example once, got 7 for client 'a' and for client 'b'"),
    "a format to come": ({**WHOLE, "format": 2}, "Expected `format` of .* to be 1, got 2"),
    "a format that is no number": ({**WHOLE, "format": True}, "Expected `format` of .* to be 1, got True"),
    "a field too many": ({**WHOLE, "test": [1]}, "to have the fields clients, .*validation, got 'test'"),
    "no data": ({**WHOLE, "data": None}, "Expected `data` of .* to be a text, got nothing"),
    "no number of examples": (
        {**WHOLE, "num_examples": 1.5},
        "`num_examples` of .* to be a whole number, got a number",
    ),
    "clients in a list": ({**WHOLE, "clients": [[1]]}, "Expected `clients` of .* to be a mapping, got a list"),
    "a whole file without clients": ({**WHOLE, "clients": {}, "local_test": {}}, f"{MAPPING} one without clients"),
    "a meta set in a mapping": ({**WHOLE, "meta": {}}, "a list of indices for the meta set, got an empty mapping"),
    "in the meta set too": ({**WHOLE, "meta": [4]}, "got 4 for client 'north' and for the meta set"),
    "in both sets": ({**WHOLE, "validation": [9]}, "got 9 for the meta set and for the validation set"),
    "local tests in a list": ({**WHOLE, "local_test": [1]}, "`local_test` of .* to be a mapping .*, got a list"),
    "local tests of nobody": ({**WHOLE, "local_test": {"x": [1]}}, "`local_test` of .* to name its clients, got 'x'"),
    "trained on and tested": (
        {**WHOLE, "local_test": {"north": [4]}},
        "got 4 for client 'north' and for the local test set of client 'north'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line_with_the_file(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_partition(path)
    assert str(caught.value).startswith("Expected ")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no such file"):
        read_partition(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"cannot be read .*it is not a regular file"):
        read_partition(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_partition(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read .*decode"):
        read_partition(tmp_path / "bytes")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, WHOLE)
    monkeypatch.setattr(partition_file, "MAX_BYTES", 50)
    with pytest.raises(ValueError, match=r"partition\.json to have at most 50 bytes, got 1\d\d"):
        read_partition(path)
    monkeypatch.undo()
    monkeypatch.setattr("fedamm_pl.data.sources.reading.available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="to fit into memory"):
        read_partition(path)


@pytest.mark.parametrize(
    ("num_examples", "content", "message"),
    [
        (13, "abc", "to be a partition of these data, 13 training examples, got one of 12"),
        (12, "abd", r"to be a partition of these data \(content abd\), got one of others \(content abc\)"),
    ],
)
def test_a_file_of_other_data_is_refused(num_examples: int, content: str, message: str, tmp_path: Path) -> None:
    found = read_partition(written(tmp_path, WHOLE))
    with pytest.raises(ValueError, match=message):
        found.require_data(num_examples, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [0], "b": [3, 12]}, "to hold indices from 0 to 11, got 12 for client 'b'"),
        ({**WHOLE, "meta": [2, 99]}, "to hold indices from 0 to 11, got 99 for the meta set"),
    ],
)
def test_an_example_that_does_not_exist_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    found = read_partition(written(tmp_path, content))
    with pytest.raises(ValueError, match=message):
        found.require_data(12, "abc")


def test_a_name_that_is_there_twice_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    names = ", ".join(f'"{i}": []' for i in [*range(200_000), 199_999])
    with pytest.raises(ValueError, match="to have each name once, got '199999' twice"):
        read_partition(written(tmp_path, f"{{{names}}}"))
