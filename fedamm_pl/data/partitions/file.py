"""Partitions in JSON files: the training examples of each client; every run writes one, and runs can read them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.natural import require_different, require_name
from fedamm_pl.data.sources.reading import UnusableFileError, reading, require_memory

FORMAT = 1
MAX_BYTES = 1_000_000_000
"""Maximum size of a file; a hundred million examples take less."""
SETS = ("meta", "validation")
"""Lists of examples in addition to those of the clients."""


@dataclass(frozen=True)
class PartitionFile:
    """The content of a partition file.

    Attributes:
        path: The file.
        clients: Name -> sorted indices of the client's training examples, in the order of the file.
        meta: Indices of the meta set in the order of the file; None if the file names none.
        validation: Indices of the validation set, likewise.
        local_test: Name -> sorted indices of the examples that the client keeps for local tests; may be empty.
        num_examples: Size of the training set to which the file belongs; None in a plain file.
        content: Hash of the data to which the file belongs; None in a plain file.
        rows: Name of a part of the data (train, val, test) -> the rows of the data file that contain its examples. This
            is written for other programs, and not read.
    """

    path: Path
    clients: dict[str, Indices]
    meta: Indices | None = None
    validation: Indices | None = None
    local_test: dict[str, Indices] = field(default_factory=dict)
    num_examples: int | None = None
    content: str | None = None
    rows: Mapping[str, Indices] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, Indices]]:
        """Yield every list of examples with its name in messages."""
        yield from ((f"client {name!r}", mine) for name, mine in self.clients.items())
        yield from ((f"the local test set of client {name!r}", mine) for name, mine in self.local_test.items())
        yield from ((f"the {name} set", mine) for name in SETS if (mine := getattr(self, name)) is not None)

    def require_data(self, num_examples: int, content: str) -> None:
        """Check that the file belongs to these data.

        Args:
            num_examples: Size of the training set.
            content: Hash of the data.

        Raises:
            UnusableFileError: If it belongs to other data, or contains an index that does not exist.
        """
        if self.num_examples not in (None, num_examples):
            self._refuse(
                f"to be a partition of these data, {num_examples} training examples, got one of {self.num_examples}"
            )
        if self.content not in (None, content):
            self._refuse(
                f"to be a partition of these data (content {content:.12}), got one of others (content {self.content:.12}): "
                "where the test set is drawn, another seed or test_fraction makes them others"
            )
        for part, mine in self.parts():
            if len(outside := mine[mine >= num_examples]):
                self._refuse(f"to hold indices from 0 to {num_examples - 1}, got {outside[0]} for {part}")

    def require_disjoint(self) -> None:
        """Check that no example occurs twice, in one list or in two.

        Raises:
            UnusableFileError: If an example occurs twice; the message names it and the lists that contain it.
        """
        parts = list(self.parts())
        everything = np.concatenate([mine for _, mine in parts])
        owners = np.repeat(np.arange(len(parts)), [len(mine) for _, mine in parts])
        order = np.argsort(everything, kind="stable")
        again = np.flatnonzero(np.diff(everything[order]) == 0)
        if len(again):
            index = int(everything[order[again[0]]])
            first, second = (parts[owners[order[again[0] + step]]][0] for step in (0, 1))
            where = f"twice for {first}" if first == second else f"for {first} and for {second}"
            self._refuse(f"to hold each example once, got {index} {where}")

    def _refuse(self, what: str) -> NoReturn:
        raise UnusableFileError(f"Expected {self.path} {what}.")


def read_partition(path: Path) -> PartitionFile:
    """Read a file written by :func:`partition_json`, or a plain mapping of clients to lists of indices.

    Args:
        path: The file.

    Returns:
        The content, in which no example occurs twice. It is not checked whether it belongs to the present data.

    Raises:
        UnusableFileError: If it is not such a file; the message names file, client and index.
    """
    expected = "a file of JSON with the examples of each client, got one that cannot be read"
    with reading(path, expected):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnusableFileError(f"Expected {path} to have at most {MAX_BYTES:,} bytes, got {size:,}.")
        require_memory(12 * size, str(path))  # three digits and a comma become 36 bytes
        found = _parsed(path, path.read_text(encoding="utf-8-sig"))
    found.require_disjoint()
    return found


def partition_json(partition: PartitionFile) -> bytes:
    """Return the content of a file from which :func:`read_partition` reads the same partition.

    Args:
        partition: The partition; its path is not used.
    """
    plain = {
        "format": FORMAT,
        "data": partition.content,
        "num_examples": partition.num_examples,
        "clients": _lists(partition.clients),
        **{name: getattr(partition, name).tolist() for name in SETS if getattr(partition, name) is not None},
        **({"local_test": _lists(partition.local_test)} if partition.local_test else {}),
        **({"rows": _lists(partition.rows)} if partition.rows else {}),
    }
    return json.dumps(plain).encode()


def _lists(parts: Mapping[str, Indices]) -> dict[str, list[int]]:
    return {name: mine.tolist() for name, mine in parts.items()}


def _parsed(path: Path, text: str) -> PartitionFile:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise UnusableFileError(f"Expected {path} to have each name once, got {twice!r:.80} twice.")
        return found

    content = json.loads(text, object_pairs_hook=once)
    whole = f"Expected {path} to be a mapping of each client to a list of indices"
    if not isinstance(content, dict) or not content:
        raise UnusableFileError(f"{whole}, got {_kind(content)}.")
    if "format" not in content or isinstance(content["format"], list):
        return PartitionFile(path, _clients(path, content, "client"))
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise UnusableFileError(f"Expected `format` of {path} to be {FORMAT}, got {content['format']!r:.80}.")
    known = {"format", "data", "num_examples", "clients", *SETS, "local_test", "rows"}
    if other := [name for name in content if name not in known]:
        raise UnusableFileError(f"Expected {path} to have the fields {', '.join(sorted(known))}, got {other[0]!r:.80}.")
    for name, kind in {"data": str, "num_examples": int, "clients": dict}.items():
        if type(content.get(name)) is not kind:
            raise UnusableFileError(
                f"Expected `{name}` of {path} to be {_NAMED[kind]}, got {_kind(content.get(name))}."
            )
    if not isinstance(content.get("local_test", {}), dict):
        raise UnusableFileError(
            f"Expected `local_test` of {path} to be a mapping of each client to a list of indices, "
            f"got {_kind(content['local_test'])}."
        )
    clients = _clients(path, content["clients"], "client")
    if not clients:
        raise UnusableFileError(f"{whole}, got one without clients.")
    local_test = _clients(path, content.get("local_test", {}), "the local test set of client")
    if strangers := [name for name in local_test if name not in clients]:
        raise UnusableFileError(f"Expected `local_test` of {path} to name its clients, got {strangers[0]!r}.")
    sets = {name: _indices(path, content[name], f"the {name} set") for name in SETS if name in content}
    return PartitionFile(
        path,
        clients,
        sets.get("meta"),
        sets.get("validation"),
        local_test,
        num_examples=content["num_examples"],
        content=content["data"],
    )


def _clients(path: Path, content: Mapping[str, Any], kind: str) -> dict[str, Indices]:
    for place, name in enumerate(content):
        require_name(name, f"client {place} of {path}")
    require_different(content, str(path))
    return {name: np.sort(_indices(path, mine, f"{kind} {name!r}")) for name, mine in content.items()}


def _indices(path: Path, content: Any, part: str) -> Indices:
    if not isinstance(content, list):
        raise UnusableFileError(f"Expected {path} to have a list of indices for {part}, got {_kind(content)}.")
    for index in content:
        if type(index) is not int or not 0 <= index < 2**63:
            raise UnusableFileError(
                f"Expected {path} to hold whole numbers from 0 up, got {json.dumps(index):.80} for {part}."
            )
    return np.array(content, dtype=np.int64)


_NAMED = {
    str: "a text",
    int: "a whole number",
    dict: "a mapping",
    list: "a list",
    float: "a number",
    bool: "true or false",
}


def _kind(value: Any) -> str:
    """Return the description of a JSON value in messages."""
    if isinstance(value, dict | list) and not value:
        return "an empty " + _NAMED[type(value)].partition(" ")[2]
    return _NAMED.get(type(value), "nothing")
