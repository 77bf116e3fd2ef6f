"""The split of a training set: meta and validation sets, long tail, clients, and the examples that are left over."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.file_split import SIZES, FileSplit, split_of_file
from fedamm_pl.data.local_test import hold_out
from fedamm_pl.data.long_tail import Indices, long_tail_split
from fedamm_pl.data.partitions import EQUAL, partition
from fedamm_pl.data.partitions.file import PartitionFile, partition_json
from fedamm_pl.data.partitions.natural import by_client, shown_name
from fedamm_pl.seeding import numpy_generator

BALANCED_UP_TO = 2
"""Classes whose sizes differ by a larger factor are already long-tailed; a warning is logged if they are cut again."""
SILENT_UP_TO = 0.05
"""Share of the images that a partition may leave over without a warning; it is reported in either case."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederatedSplit:
    """The division of a training set among clients and server.

    Attributes:
        clients: Sorted indices of each client.
        train: Sorted indices of all clients together.
        meta: Indices of the balanced meta set, grouped by class.
        class_counts: Images per class that clients hold, by class index.
        unused: Images per class that the partition leaves over.
        left_over: Description of the unused images; empty if there are none.
        client_names: The name of each client, or its number if it has no name.
        validation: Indices of the balanced validation set, grouped by class.
        local_test: Sorted indices of the examples that each client holds out for local tests; empty if no client does.
    """

    clients: list[Indices]
    train: Indices
    meta: Indices
    class_counts: list[int]
    unused: list[int]
    left_over: str
    client_names: list[str]
    validation: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    local_test: list[Indices] = field(default_factory=list)

    def partition_json(self, num_examples: int, content: str, rows: Mapping[str, Indices]) -> bytes:
        """Return the content of a partition file that reproduces this split.

        Args:
            num_examples: Size of the whole training set.
            content: Hash of the data.
            rows: Name of a part of the data -> the rows of the file that contain its examples; may be empty.
        """
        clients = dict(zip(self.client_names, self.clients, strict=True))
        local_test = dict(zip(self.client_names, self.local_test, strict=True)) if self.local_test else {}
        return partition_json(
            PartitionFile(Path(), clients, self.meta, self.validation, local_test, num_examples, content, rows)
        )


def federated_split(
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
    options: Mapping[str, Any],
    owners: Sequence[str] | None = None,
    content: Callable[[], str] = str,
) -> FederatedSplit:
    """Split a training set into the meta set, the validation set, and each client's training and local test examples.

    First the meta and validation sets are taken out. Then the tail is cut, the rest is divided among the clients, and
    each client holds out its local test. With ``partition`` from_file, the split is read from a partition file instead.

    Unexpected results are logged: a tail that is cut a second time, a meta or validation set that takes most of a
    class, images and classes that no client holds, and clients without images.

    Args:
        labels: Labels of the whole training set, shape (N,).
        class_names: One name per class.
        options: Options of :class:`~fedamm_pl.data.datamodule.FederatedDataModule`.
        owners: The name of each training example's client, length N, for by_client.
        content: Returns the hash of the data, for from_file.

    Raises:
        ValueError: If an option is out of range or asks for more images than there are.
    """
    if options["partition"] == "from_file":
        return _from_file(split_of_file(labels, class_names, options, content), labels, class_names, options)
    tail = long_tail_split(
        labels,
        len(class_names),
        numpy_generator(options["seed"], "long_tail"),
        num_meta_per_class=options["num_meta_per_class"],
        num_val_per_class=options["num_val_per_class"],
        imbalance_factor=options["imbalance_factor"],
        profile=options["imbalance_profile"],
        shuffle_ranks=options["shuffle_ranks"],
        ranks_by_size=options["ranks_by_size"],
        largest_class=options["largest_class"],
        class_names=class_names,
    )
    if options["partition"] == "by_client":
        names, parts = _natural(owners, tail.train, options["num_clients"])
    else:
        if owners is not None:
            log.warning(
                "the data name a client for each example; partition %s ignores this, by_client uses it",
                options["partition"],
            )
        parts = partition(labels[tail.train], options)
        names = [str(client) for client in range(len(parts))]
    clients = [tail.train[mine] for mine in parts]
    held = np.bincount(labels[np.concatenate(clients)], minlength=len(class_names))
    unused = (np.asarray(tail.class_counts) - held).tolist()
    clients, local_test = hold_out(clients, labels, class_names, options["local_test_fraction"], options["seed"])
    train = np.sort(np.concatenate(clients))
    why = "all clients hold equally many" if options["partition"] in EQUAL else "the partition gives them to no client"
    left_over = _left_over(unused, _absent(held, class_names), len(tail.train), why)
    if left_over:
        weighty = sum(unused) > SILENT_UP_TO * len(tail.train) or not held.all()
        log.log(logging.WARNING if weighty else logging.DEBUG, "partition %s: %s", options["partition"], left_over)
    _warn_of_empty_clients(clients, names)
    thrown_away = len(labels) - len(tail.meta) - len(tail.validation) - len(tail.train)
    _warn_of_a_second_cut(labels, class_names, options, thrown_away)
    _warn_of_small_classes(labels, class_names, options)
    counts = np.bincount(labels[train], minlength=len(class_names)).tolist()
    return FederatedSplit(clients, train, tail.meta, counts, unused, left_over, names, tail.validation, local_test)


def _natural(owners: Sequence[str] | None, kept: Indices, num_clients: int | None) -> tuple[list[str], list[Indices]]:
    if owners is None:
        raise ValueError(
            "Expected `partition` to be by_client for data that say whose each example is, got data that do not: tables do "
            "by a column of clients, which `client_column` names, and folders where each client has one."
        )
    names, parts = by_client(owners, kept)
    _require_number(num_clients, len(names), "the data have")
    return names, parts


def _from_file(
    found: FileSplit, labels: npt.NDArray[np.int64], class_names: Sequence[str], options: Mapping[str, Any]
) -> FederatedSplit:
    path = options["partition_file"]
    _require_number(options["num_clients"], len(found.names), f"{path} has")
    clients, local_test, ignored = found.clients, found.local_test, "the options of imbalance are"
    if local_test and options["local_test_fraction"]:
        ignored = "the options of imbalance and local_test_fraction are"
    if not local_test:
        clients, local_test = hold_out(clients, labels, class_names, options["local_test_fraction"], options["seed"])
    num_classes, train = len(class_names), np.sort(np.concatenate(clients))
    held = np.bincount(labels[train], minlength=num_classes)
    apart = np.concatenate([found.meta, found.validation, *local_test])
    unused = np.bincount(labels, minlength=num_classes) - held - np.bincount(labels[apart], minlength=num_classes)
    lost = _absent(held, class_names)
    left_over = _left_over(unused.tolist(), lost, len(labels), "the file gives them to no client")
    unchecked = (
        ""
        if found.checked
        else "; it does not say of which data it is, so there is no check that it is of these: its numbers are taken for places "
        f"among the {len(labels)} training examples, from 0"
    )
    log.info("partition_file %s determines the partition: %s not used%s", path, ignored, unchecked)
    if lost:
        log.warning("partition_file %s: classes that no client holds: %s", path, shortened(lost))
    _warn_of_empty_clients(clients, found.names)
    return FederatedSplit(
        *(clients, train, found.meta, held.tolist(), unused.tolist(), left_over, found.names),
        validation=found.validation,
        local_test=local_test,
    )


def _require_number(num_clients: int | None, found: int, whose: str) -> None:
    if num_clients not in (None, found):
        raise ValueError(f"Expected `num_clients` to be null or {found}, the clients that {whose}, got {num_clients}.")


def _absent(held: npt.NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    return [name for name, count in zip(class_names, held, strict=True) if not count]


def _warn_of_empty_clients(clients: Sequence[Indices], names: Sequence[str]) -> None:
    if empty := [shown_name(name) for name, mine in zip(names, clients, strict=True) if not len(mine)]:
        log.warning("%d clients hold no examples and take part in no round: %s", len(empty), shortened(empty))


def _left_over(unused: Sequence[int], lost: Sequence[str], num_images: int, why: str) -> str:
    if not sum(unused):
        return ""
    share = f"{sum(unused)} of {num_images} training examples ({100 * sum(unused) / num_images:.2g} %)"
    gone = f"; classes that no client holds: {shortened(lost)}" if lost else ""
    return f"{share} are left over, since {why}, and used by nobody{gone}"


def _warn_of_small_classes(
    labels: npt.NDArray[np.int64], class_names: Sequence[str], options: Mapping[str, Any]
) -> None:
    sizes, taken = np.bincount(labels, minlength=len(class_names)), sum(options[name] for name in SIZES.values())
    small = [f"{name} ({size})" for name, size in zip(class_names, sizes, strict=True) if taken > size / 2]
    if taken and small:
        log.warning(
            "num_meta_per_class %d and num_val_per_class %d take %d training examples of each class, more than half of those of: %s",
            *(options[name] for name in SIZES.values()),
            taken,
            shortened(small),
        )


def _warn_of_a_second_cut(
    labels: npt.NDArray[np.int64], class_names: Sequence[str], options: Mapping[str, Any], thrown_away: int
) -> None:
    sizes = np.bincount(labels, minlength=len(class_names))
    least, most = int(sizes.argmin()), int(sizes.argmax())
    if options["imbalance_profile"] == "none" or not thrown_away or sizes[most] <= BALANCED_UP_TO * sizes[least]:
        return
    order = "size" if options["ranks_by_size"] else "chance" if options["shuffle_ranks"] else "index"
    log.warning(
        "the classes differ in size already (class %s has %d examples, class %s has %d): imbalance_profile %s, which ranks "
        "classes by %s, discards %d of %d examples; imbalance_profile none keeps them all",
        *(class_names[most], sizes[most], class_names[least], sizes[least]),
        *(options["imbalance_profile"], order, thrown_away, len(labels)),
    )


def shortened(listed: Sequence[object], shown: int = 10) -> str:
    """Format the first elements of a list."""
    return ", ".join(map(str, listed[:shown])) + (", ..." if len(listed) > shown else "")
