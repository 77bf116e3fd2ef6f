"""A partition by a user-defined function, which is imported by its path; its result is checked."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.simulated import Labels, require_clients
from fedamm_pl.foreign import failure, imported


def own_partition(
    name: str, expected: str, labels: Labels, num_clients: int, make_rng: Callable[[], np.random.Generator]
) -> list[Indices]:
    """Call a user-defined function ``f(labels, num_clients, rng)`` and check its result.

    It is called twice and must return the same result: a function with other sources of randomness than ``rng`` would
    return a different partition in each process.

    Args:
        name: The import path of f.
        expected: The beginning of the error message if there is no such function.
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        make_rng: Creates the source of all draws.

    Returns:
        K disjoint, sorted index arrays.

    Raises:
        ValueError: If there is no such function, it raises an error, or it returns anything else.
    """
    require_clients(labels, num_clients)
    function = imported(name, expected)
    first, second = (_called(name, function, labels.copy(), num_clients, make_rng()) for _ in range(2))
    if not all(np.array_equal(mine, again) for mine, again in zip(first, second, strict=True)):
        raise ValueError(
            f"Expected {name} to return the same partition whenever it is called with the same arguments, got two different ones: draw "
            "only from the generator that it is given."
        )
    return first


def _called(
    name: str, function: Callable[..., Any], labels: Labels, num_clients: int, rng: np.random.Generator
) -> list[Indices]:
    num_examples = len(labels)
    try:
        returned = function(labels, num_clients, rng)
        clients = [np.asarray(mine) for mine in returned]
    except Exception as error:  # the function may raise any error
        raise ValueError(
            f"Expected {name}(labels, num_clients, rng) to return the indices of each client, got {failure(error)}."
        ) from error
    if len(clients) != num_clients:
        raise ValueError(
            f"Expected {name} to return {num_clients} arrays of indices, one per client, got {len(clients)}."
        )
    holders = np.full(num_examples, -1)
    for client, found in enumerate(clients):
        if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
            raise ValueError(
                f"Expected {name} to return whole numbers in one dimension for client {client}, got an array of "
                f"{found.dtype} of shape {found.shape}."
            )
        if len(outside := found[(found < 0) | (found >= num_examples)]):
            raise ValueError(
                f"Expected {name} to return indices from 0 to {num_examples - 1}, got {outside[0]} for client {client}."
            )
        mine = clients[client] = np.sort(found.astype(np.int64))
        if len(again := mine[np.flatnonzero(np.diff(mine) == 0)]):
            raise ValueError(f"Expected {name} to return each example once, got {again[0]} twice for client {client}.")
        if len(taken := mine[holders[mine] >= 0]):
            raise ValueError(
                f"Expected {name} to return each example once, got {taken[0]} for client {holders[taken[0]]} and for "
                f"client {client}."
            )
        holders[mine] = client
    if (holders < 0).all():
        raise ValueError(f"Expected {name} to return indices of training examples, got none for any client.")
    return clients
