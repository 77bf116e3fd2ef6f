"""The split given by a partition file: its clients, and meta and validation sets that it names or that are drawn."""

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
"""Set of the server -> the option for its size per class."""


@dataclass(frozen=True)
class FileSplit:
    """The division of a training set according to a partition file.

    Attributes:
        names: Names of the clients, in the order of the file.
        clients: Sorted indices of each client.
        meta: Indices of the balanced meta set, grouped by class.
        validation: Indices of the balanced validation set, grouped by class.
        local_test: Sorted indices of the examples that each client keeps for local tests; no lists if the file has
            none.
        checked: Whether the file contains a hash of its data, so that they could be checked.
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
    """Split a training set as a partition file specifies.

    If the file does not name the meta or validation set, the set is drawn from examples that no client holds.

    Args:
        labels: Labels of the whole training set, shape (N,).
        class_names: One name per class.
        options: ``partition_file``, ``num_meta_per_class``, ``num_val_per_class`` and ``seed`` are used.
        content: Returns the hash of the data; called if the file contains the hash of its data.

    Raises:
        ValueError: If the file cannot be read, belongs to other data, or its sets do not have the sizes in the options.
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
