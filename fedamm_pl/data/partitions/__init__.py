"""Partitions of a labelled training set over clients, by name: simulated ones, and user-defined functions."""

from collections.abc import Mapping
from typing import Any

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.dirichlet import by_dirichlet_balanced, by_dirichlet_blocks
from fedamm_pl.data.partitions.local_long_tail import by_local_long_tail
from fedamm_pl.data.partitions.own import own_partition
from fedamm_pl.data.partitions.simulated import Labels, by_dirichlet, by_num_classes, by_shards, iid
from fedamm_pl.hints import similar
from fedamm_pl.seeding import numpy_generator

NUM_CLIENTS = 20
"""Default number of clients of a simulated partition."""
SIMULATED = (
    "by_num_classes",
    "by_dirichlet",
    "by_dirichlet_blocks",
    "by_dirichlet_balanced",
    "by_local_long_tail",
    "by_shards",
    "iid",
)
EQUAL = ("by_num_classes", "by_dirichlet_balanced", "by_shards")
"""Partitions that leave images over, because all clients hold the same number of images."""
MIN_SIZED = ("by_dirichlet", "by_local_long_tail")
"""Partitions that use ``min_client_size``."""
USED_BY = {
    "min_classes_per_client": ("by_num_classes",),
    "dirichlet_alpha": ("by_dirichlet", "by_dirichlet_blocks", "by_dirichlet_balanced"),
    "local_imbalance_factor": ("by_local_long_tail",),
    "min_client_size": MIN_SIZED,
    "shards_per_client": ("by_shards",),
}
"""Option -> the partitions that use it."""
NAMED = ("by_client", "from_file")
"""Partitions with given clients."""
EXPECTED = (
    f"Expected `partition` to be one of {', '.join((*SIMULATED, *NAMED))}, or the import path of a function "
    "f(labels, num_clients, rng)"
)


def require_partition(name: str, partition_file: str) -> None:
    """Check the name of a partition, and that a file is given if and only if the partition needs one.

    Raises:
        ValueError: If there is no such partition, or a file is missing or not needed.
    """
    if name not in (*SIMULATED, *NAMED) and "." not in name:
        meant = similar(name, (*SIMULATED, *NAMED))
        raise ValueError(f"{EXPECTED}, got {name}" + (f"; did you mean {meant}?" if meant else "."))
    if (name == "from_file") != bool(partition_file):
        if not partition_file:
            raise ValueError("Expected `partition_file` to name the file for partition from_file, got none.")
        raise ValueError(f"Expected `partition` to be from_file for partition_file {partition_file}, got {name}.")


def partition(labels: Labels, options: Mapping[str, Any]) -> list[Indices]:
    """Divide the examples among clients with the partition named in the options.

    Raises:
        ValueError: If there is no such partition, or one of its options is out of range.
    """
    num_clients = NUM_CLIENTS if options["num_clients"] is None else options["num_clients"]
    name, alpha, smallest = options["partition"], options["dirichlet_alpha"], options["min_client_size"]
    rng = numpy_generator(options["seed"], "partition")
    match name:
        case "by_num_classes":
            return by_num_classes(labels, num_clients, rng, min_classes=options["min_classes_per_client"])
        case "by_dirichlet":
            return by_dirichlet(labels, num_clients, rng, alpha=alpha, min_size=smallest)
        case "by_dirichlet_blocks":
            return by_dirichlet_blocks(labels, num_clients, rng, alpha=alpha)
        case "by_dirichlet_balanced":
            return by_dirichlet_balanced(labels, num_clients, rng, alpha=alpha)
        case "by_local_long_tail":
            factor = options["local_imbalance_factor"]
            return by_local_long_tail(labels, num_clients, rng, local_imbalance_factor=factor, min_size=smallest)
        case "by_shards":
            return by_shards(labels, num_clients, rng, shards_per_client=options["shards_per_client"])
        case "iid":
            return iid(labels, num_clients, rng)
    require_partition(name, "")
    return own_partition(name, EXPECTED, labels, num_clients, lambda: numpy_generator(options["seed"], "partition"))
