"""The split of a training set: its meta set, its long tail, its clients, and what none of them holds."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.long_tail import Indices, long_tail_split
from fedamm_pl.data.partition import by_dirichlet, by_num_classes, by_shards, iid
from fedamm_pl.seeding import numpy_generator

Partition = Literal["by_num_classes", "by_dirichlet", "by_shards", "iid"]
BALANCED_UP_TO = 2
"""Classes that differ in size by more are long-tailed already: cutting them again is worth a warning."""
SILENT_UP_TO = 0.05
"""Share of the images that a partition may leave over without a warning; it is reported in any case."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FederatedSplit:
    """Who holds which examples of a training set.

    Attributes:
        clients: Sorted indices of each client.
        train: Sorted indices of all clients together.
        meta: Indices of the balanced meta set, grouped by class.
        class_counts: Images per class that clients hold, by class index.
        unused: Images per class that the partition leaves over.
        left_over: The same in words; empty where nothing is left over.
    """

    clients: list[Indices]
    train: Indices
    meta: Indices
    class_counts: list[int]
    unused: list[int]
    left_over: str


def federated_split(
    labels: npt.NDArray[np.int64], class_names: Sequence[str], options: Mapping[str, Any]
) -> FederatedSplit:
    """Take out the meta set, cut the tail, share the rest out to clients.

    What would surprise is logged: a tail that is cut a second time, images and classes that no client holds, clients without
    images.

    Args:
        labels: Labels of the whole training set, shape (N,).
        class_names: One name a class.
        options: Those of :class:`~fedamm_pl.data.datamodule.FederatedDataModule`.

    Raises:
        ValueError: If an option is out of range or asks for more images than there are.
    """
    tail = long_tail_split(
        labels,
        len(class_names),
        numpy_generator(options["seed"], "long_tail"),
        num_meta_per_class=options["num_meta_per_class"],
        imbalance_factor=options["imbalance_factor"],
        profile=options["imbalance_profile"],
        shuffle_ranks=options["shuffle_ranks"],
        ranks_by_size=options["ranks_by_size"],
        class_names=class_names,
    )
    clients = [tail.train[mine] for mine in partition(labels[tail.train], options)]
    train = np.sort(np.concatenate(clients))
    held = np.bincount(labels[train], minlength=len(class_names))
    unused = (np.asarray(tail.class_counts) - held).tolist()
    left_over = _left_over(
        unused, [name for name, count in zip(class_names, held, strict=True) if not count], len(tail.train)
    )
    if left_over:
        weighty = sum(unused) > SILENT_UP_TO * len(tail.train) or not held.all()
        log.log(logging.WARNING if weighty else logging.DEBUG, "partition %s: %s", options["partition"], left_over)
    if empty := [client for client, mine in enumerate(clients) if not len(mine)]:
        log.warning("%d clients hold no images and take part in no round: %s", len(empty), shortened(empty))
    _warn_of_a_second_cut(labels, class_names, options, len(labels) - len(tail.meta) - len(tail.train))
    return FederatedSplit(clients, train, tail.meta, held.tolist(), unused, left_over)


def partition(labels: npt.NDArray[np.int64], options: Mapping[str, Any]) -> list[Indices]:
    """Share the examples out to clients, as :mod:`fedamm_pl.data.partition` does by the name that is asked for.

    Raises:
        ValueError: If there is no such partition, or an option of it is out of range.
    """
    num_clients, rng = options["num_clients"], numpy_generator(options["seed"], "partition")
    match options["partition"]:
        case "by_num_classes":
            return by_num_classes(labels, num_clients, rng, min_classes=options["min_classes_per_client"])
        case "by_dirichlet":
            alpha, smallest = options["dirichlet_alpha"], options["min_client_size"]
            return by_dirichlet(labels, num_clients, rng, alpha=alpha, min_size=smallest)
        case "by_shards":
            return by_shards(labels, num_clients, rng, shards_per_client=options["shards_per_client"])
        case "iid":
            return iid(labels, num_clients, rng)
    raise ValueError(
        f"Expected `partition` to be by_num_classes, by_dirichlet, by_shards or iid, got {options['partition']!r}."
    )


def _left_over(unused: Sequence[int], lost: Sequence[str], num_images: int) -> str:
    if not sum(unused):
        return ""
    share = f"{sum(unused)} of {num_images} training images ({100 * sum(unused) / num_images:.2g} %)"
    gone = f"; classes that nobody holds: {shortened(lost)}" if lost else ""
    return f"{share} are left over, since all clients hold equally many, and used by nobody{gone}"


def _warn_of_a_second_cut(
    labels: npt.NDArray[np.int64], class_names: Sequence[str], options: Mapping[str, Any], thrown_away: int
) -> None:
    sizes = np.bincount(labels, minlength=len(class_names))
    least, most = int(sizes.argmin()), int(sizes.argmax())
    if options["imbalance_profile"] == "none" or not thrown_away or sizes[most] <= BALANCED_UP_TO * sizes[least]:
        return
    order = "size" if options["ranks_by_size"] else "chance" if options["shuffle_ranks"] else "index"
    log.warning(
        "the classes differ in size already (class %s has %d images, class %s has %d): imbalance_profile %s, which ranks "
        "classes by %s, throws %d of %d images away; imbalance_profile none keeps them all",
        *(class_names[most], sizes[most], class_names[least], sizes[least]),
        *(options["imbalance_profile"], order, thrown_away, len(labels)),
    )


def shortened(listed: Sequence[object], shown: int = 10) -> str:
    """Format a list of which the first few are shown."""
    return ", ".join(map(str, listed[:shown])) + (", ..." if len(listed) > shown else "")
