"""The split that a partition file says: its clients, and the meta and validation set that it names or leaves room for."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.file import PartitionFile, read_partition
from fedamm_pl.data.sources.reading import UnusableFileError
from fedamm_pl.seeding import numpy_generator

Labels = npt.NDArray[np.int64]
SIZES = {"meta": "num_meta_per_class", "validation": "num_val_per_class"}
"""Set of the server's -> the option that says how large it is."""


@dataclass(frozen=True)
class FileSplit:
    """Who holds which examples by a partition file.

    Attributes:
        names: Of the clients, in the order of the file.
        clients: Sorted indices of each client.
        meta: Indices of the balanced meta set, grouped by class.
        validation: The same of the validation set.
        local_test: Sorted indices of what each client keeps for tests of its own; no lists if the file has none.
        checked: Whether the file has said that it is of these data.
    """

    names: list[str]
    clients: list[Indices]
    meta: Indices
    validation: Indices
    local_test: list[Indices]
    checked: bool


def split_of_file(
    labels: Labels, class_names: Sequence[str], options: Mapping[str, Any], content: Callable[[], str]
) -> FileSplit:
    """Do as a partition file says. A set of the server's that it does not name is drawn from what no client holds.

    Args:
        labels: Labels of the whole training set, shape (N,).
        class_names: One name per class.
        options: ``partition_file``, ``num_meta_per_class``, ``num_val_per_class`` and ``seed`` are used.
        content: Returns the hash of the data; called if the file says of which it is.

    Raises:
        ValueError: If the file cannot be read, is of other data, or its sets are not as large as the options say.
    """
    found = read_partition(Path(os.path.expanduser(options["partition_file"])))
    found.require_data(len(labels), "" if found.content is None else content())
    if not any(map(len, found.clients.values())):
        raise UnusableFileError(f"Expected {found.path} to give clients training examples, got none for any.")
    free = np.ones(len(labels), dtype=bool)
    for _, mine in found.parts():
        free[mine] = False
    rng = numpy_generator(options["seed"], "long_tail")
    sets = {}
    for name, option in SIZES.items():
        size, members = options[option], getattr(found, name)
        if members is None:
            members = _drawn(found, labels, class_names, free, rng, name, option, size)
            free[members] = False
        else:
            _require_size(found, labels[members], class_names, name, option, size)
        sets[name] = members[np.argsort(labels[members], kind="stable")]
    nothing = np.empty(0, dtype=np.int64)
    local = [found.local_test.get(name, nothing) for name in found.clients] if found.local_test else []
    names, clients = list(found.clients), list(found.clients.values())
    return FileSplit(names, clients, sets["meta"], sets["validation"], local, found.content is not None)


def _drawn(
    found: PartitionFile,
    labels: Labels,
    class_names: Sequence[str],
    free: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    name: str,
    option: str,
    size: int,
) -> Indices:
    members = []
    for label, class_name in enumerate(class_names):
        left = np.flatnonzero(free & (labels == label))
        if len(left) < size:
            raise UnusableFileError(
                f"Expected {found.path} to leave `{option}` = {size} training examples of each class to no client, for the "
                f"{name} set, got {len(left)} of class {class_name}: give fewer to clients, or lower the option."
            )
        members.append(rng.permutation(left)[:size])
    return np.concatenate(members)


def _require_size(
    found: PartitionFile, labels: Labels, class_names: Sequence[str], name: str, option: str, size: int
) -> None:
    counts = np.bincount(labels, minlength=len(class_names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] != counts[most]:
        raise UnusableFileError(
            f"Expected the {name} set of {found.path} to hold equally many examples of each class, got {counts[least]} of "
            f"class {class_names[least]} and {counts[most]} of class {class_names[most]}."
        )
    if counts[least] != size:
        raise UnusableFileError(
            f"Expected `{option}` to be {counts[least]}, as in the {name} set of {found.path}, got {size}."
        )
