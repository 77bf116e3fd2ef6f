"""A partition in which every client has its own long tail, with the classes in a different order."""

import numpy as np

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.simulated import MAX_REDRAWS, Labels, require_clients, require_min_size


def by_local_long_tail(
    labels: Labels,
    num_clients: int,
    rng: np.random.Generator,
    *,
    local_imbalance_factor: float = 0.1,
    min_size: int = 10,
) -> list[Indices]:
    """Divide each class among the clients, where every client prefers the classes in a different random order.

    Each client k ranks the classes at random, and gives the class of rank r the weight
    w = local_imbalance_factor^(r / (C - 1)). The examples of class c are divided in proportion to the clients' weights
    w_kc, so that a globally rare class can be the largest class of a client. To get whole numbers, the class is cut at
    the rounded cumulative shares, with the clients in a new random order for each class. The rankings are redrawn until
    every client has at least ``min_size`` examples.

    With a factor of 1 every client gets an equal part of each class. With smaller factors, each class belongs more and
    more only to the clients that rank it highest.

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        local_imbalance_factor: Weight of a client's last-ranked class divided by that of its first, in (0, 1].
        min_size: Minimum number of examples of a client; 0 allows clients without examples.

    Returns:
        K disjoint, sorted index arrays that hold every example.

    Raises:
        ValueError: If an option is out of range or no draw out of 1000 gives every client ``min_size`` examples.
    """
    require_clients(labels, num_clients)
    require_min_size(min_size)
    if not 0 < local_imbalance_factor <= 1:
        raise ValueError(f"Expected `local_imbalance_factor` to be in (0, 1], got {local_imbalance_factor}.")
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    weight_of_rank = local_imbalance_factor ** (np.arange(len(members)) / max(len(members) - 1, 1))
    for _ in range(MAX_REDRAWS):
        weights = rng.permuted(np.tile(weight_of_rank, (num_clients, 1)), axis=1)  # (K, C)
        parts: list[list[Indices]] = [[] for _ in range(num_clients)]
        for mine, weight in zip(members, weights.T, strict=True):
            order = rng.permutation(num_clients)
            cuts = np.round(np.cumsum(weight[order] / weight.sum())[:-1] * len(mine)).astype(np.int64)
            for client, piece in zip(order, np.split(mine, cuts), strict=True):
                parts[client].append(piece)
        clients = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(client) for client in clients) >= min_size:
            return clients
    raise ValueError(
        f"Expected `local_imbalance_factor` to leave every client at least `min_client_size` = {min_size} examples, got none "
        f"such in {MAX_REDRAWS} draws with factor {local_imbalance_factor}, {num_clients} clients and {len(labels)} examples: "
        "raise the factor, or lower the size or the number of clients."
    )
