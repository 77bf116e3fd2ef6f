"""Partitions of a labelled training set over clients: pure functions from labels to disjoint index arrays."""

import logging

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.long_tail import Indices

Labels = npt.NDArray[np.integer]
log = logging.getLogger(__name__)

MAX_REDRAWS = 1000
"""Number of times that a partition is drawn before an error is raised."""


def require_clients(labels: Labels, num_clients: int, parts_per_client: int = 1) -> None:
    """Check that there is at least one client, and that there are enough examples for all clients.

    Raises:
        ValueError: If ``num_clients`` is out of range.
    """
    if num_clients < 1:
        raise ValueError(f"Expected `num_clients` to be 1 or more, got {num_clients}.")
    if num_clients * parts_per_client > len(labels):
        raise ValueError(
            f"Expected `num_clients` to be at most the number of training examples ({len(labels) // parts_per_client} here), "
            f"got {num_clients}."
        )


def require_alpha(alpha: float) -> None:
    """Check the concentration of a Dirichlet distribution.

    Raises:
        ValueError: If ``alpha`` is not a finite number above 0.
    """
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"Expected `dirichlet_alpha` to be a number above 0, got {alpha}.")


def require_min_size(min_size: int) -> None:
    """Check the minimum size of a client.

    Raises:
        ValueError: If ``min_size`` is below 0.
    """
    if min_size < 0:
        raise ValueError(f"Expected `min_client_size` to be 0 or more, got {min_size}.")


def by_num_classes(
    labels: Labels, num_clients: int, rng: np.random.Generator, *, min_classes: int = 2
) -> list[Indices]:
    """Create clients of equal size that hold a random number of classes (the partition of the FedAMM paper).

    For each client in order: draw s from U{min_classes..C} and s distinct classes; while these hold fewer than
    n = floor(N / K) unassigned examples, add another random class; draw n of their unassigned examples without
    replacement. The remaining N - K * n examples stay unused. The number of added classes is logged (debug).

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        min_classes: Minimum number of classes drawn for a client.

    Returns:
        K disjoint, sorted index arrays of length n.

    Raises:
        ValueError: If there are more clients than examples, or ``min_classes`` is not in 1..C.
    """
    require_clients(labels, num_clients)
    classes = np.unique(labels)
    if not 1 <= min_classes <= len(classes):
        raise ValueError(f"Expected `min_classes_per_client` to be in 1..{len(classes)}, got {min_classes}.")
    size = len(labels) // num_clients
    unassigned = {label: np.flatnonzero(labels == label) for label in classes}
    clients, added = [], 0
    for _ in range(num_clients):
        drawn = int(rng.integers(min_classes, len(classes), endpoint=True))
        order = rng.permutation(classes)
        used = drawn
        while sum(len(unassigned[label]) for label in order[:used]) < size:
            used += 1
        added += used - drawn
        pool = np.concatenate([unassigned[label] for label in order[:used]])
        mine = np.sort(rng.choice(pool, size, replace=False))
        for label in order[:used]:
            unassigned[label] = np.setdiff1d(unassigned[label], mine, assume_unique=True)
        clients.append(mine)
    if added:
        log.debug(
            "by_num_classes: the classes drawn for a client held too few examples that were still free, so clients got further "
            "classes, %d in all for %d clients; this is how the partition works",
            *(added, num_clients),
        )
    return clients


def by_dirichlet(
    labels: Labels, num_clients: int, rng: np.random.Generator, *, alpha: float = 0.5, min_size: int = 10
) -> list[Indices]:
    """Divide each class among the clients in proportions p ~ Dir_K(alpha) (Hsu et al., 2019).

    The proportions of all classes are redrawn until every client has at least ``min_size`` examples.

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        alpha: Concentration; with smaller values a client holds fewer classes.
        min_size: Minimum number of examples of a client; 0 allows clients without examples.

    Returns:
        K disjoint, sorted index arrays that hold every example.

    Raises:
        ValueError: If an option is out of range or no draw out of 1000 gives every client ``min_size`` examples.
    """
    require_clients(labels, num_clients)
    require_alpha(alpha)
    require_min_size(min_size)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    for _ in range(MAX_REDRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(members))  # (C, K)
        if not np.isfinite(shares).all():  # alpha so small that every gamma draw underflows
            continue
        parts = [
            np.split(mine, np.round(np.cumsum(share)[:-1] * len(mine)).astype(np.int64))
            for share, mine in zip(shares, members, strict=True)
        ]
        clients = [np.sort(np.concatenate(part)) for part in zip(*parts, strict=True)]
        if min(len(client) for client in clients) >= min_size:
            return clients
    raise ValueError(
        f"Expected `dirichlet_alpha` to leave every client at least `min_client_size` = {min_size} examples, got none such "
        f"in {MAX_REDRAWS} draws with alpha {alpha}, {num_clients} clients and {len(labels)} examples: raise the alpha, or "
        "lower the size or the number of clients."
    )


def by_shards(
    labels: Labels, num_clients: int, rng: np.random.Generator, *, shards_per_client: int = 2
) -> list[Indices]:
    """Sort by label, cut into equal shards, and give each client ``shards_per_client`` of them (McMahan et al., 2017).

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        shards_per_client: Shards S per client; each holds floor(N / (K * S)) examples, and the rest stays unused.

    Returns:
        K disjoint, sorted index arrays of equal length.

    Raises:
        ValueError: If there are fewer examples than shards.
    """
    if shards_per_client < 1:
        raise ValueError(f"Expected `shards_per_client` to be 1 or more, got {shards_per_client}.")
    require_clients(labels, num_clients, shards_per_client)
    num_shards = num_clients * shards_per_client
    # the rest is left out before sorting, so that it comes from all classes
    order = rng.permutation(len(labels))[: len(labels) // num_shards * num_shards]
    shards = order[np.argsort(labels[order], kind="stable")].reshape(num_shards, -1)
    deal = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.sort(shards[mine].ravel()) for mine in deal]


def iid(labels: Labels, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """Divide all examples at random; the sizes of two clients differ by at most one.

    Args:
        labels: Labels of the training set, shape (N,); only their number matters.
        num_clients: Number of clients K.
        rng: Source of all draws.

    Returns:
        K disjoint, sorted index arrays that hold every example.

    Raises:
        ValueError: If there are more clients than examples.
    """
    require_clients(labels, num_clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]


def class_histogram(labels: Labels, clients: list[Indices], num_classes: int) -> npt.NDArray[np.int64]:
    """Count the examples of each class at each client.

    Args:
        labels: Labels of the training set, shape (N,).
        clients: Index arrays of K clients.
        num_classes: Number of classes C.

    Returns:
        Counts of shape (K, C).
    """
    return np.stack([np.bincount(labels[mine], minlength=num_classes) for mine in clients])
