"""The examples that each client holds out of training, to test on its own data."""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.seeding import numpy_generator

log = logging.getLogger(__name__)


def hold_out(
    clients: Sequence[Indices],
    labels: npt.NDArray[np.integer],
    class_names: Sequence[str],
    fraction: float,
    seed: int,
) -> tuple[list[Indices], list[Indices]]:
    """Divide the examples of each client into training examples and local test examples.

    A client with n examples holds out the whole number nearest to ``fraction * n``, but at least 1 and at most n - 1; a
    client with a single example holds out none. Each of its classes contributes its share, rounded up or down, and
    every example is equally likely to be held out. The draw of a client depends only on the seed and its own examples.

    Args:
        clients: Indices of each client.
        labels: Labels of the whole training set, shape (N,).
        class_names: One name per class.
        fraction: Share of a client's examples, in [0, 1); 0: nothing is held out.
        seed: Seed of the draws.

    Returns:
        Sorted indices of each client for training, and for its local test; the second list is empty if the fraction is
        0.
    """
    if not fraction:
        return list(clients), []
    train, test = [], []
    for client, mine in enumerate(clients):
        held = _stratified(mine, labels[mine], fraction, numpy_generator(seed, "local_test", client))
        test.append(held)
        train.append(np.setdiff1d(mine, held, assume_unique=True))
    left = np.bincount(labels[np.concatenate(train)], minlength=len(class_names))
    lost = [class_names[label] for label in np.unique(labels[np.concatenate(test)]) if not left[label]]
    if lost:
        log.warning(
            "local_test_fraction %s: no client trains on class %s any more, all of its examples are held out",
            *(fraction, " and ".join(lost)),
        )
    return train, test


def _stratified(mine: Indices, labels: npt.NDArray[np.integer], fraction: float, rng: np.random.Generator) -> Indices:
    """Draw examples at equal intervals from the list sorted by class, in random order within each class."""
    number = min(max(int(fraction * len(mine) + 0.5), 1), len(mine) - 1)
    if number < 1:
        return mine[:0]
    order = rng.permutation(len(mine))
    by_class = mine[order[np.argsort(labels[order], kind="stable")]]
    return np.sort(by_class[np.floor((np.arange(number) + rng.random()) * len(mine) / number).astype(np.int64)])
