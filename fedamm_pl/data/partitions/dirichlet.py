"""Two further partitions with the Dirichlet distribution: in blocks of ten clients, and with clients of equal size."""

import numpy as np
import numpy.typing as npt

from fedamm_pl.data.long_tail import Indices
from fedamm_pl.data.partitions.simulated import Labels, require_alpha, require_clients

BLOCK = 10
"""Number of clients among which a block of the training set is divided."""
MAX_BLOCK_REDRAWS = 10_000
"""Number of times that a block is drawn.

With an imbalance of 100 and alpha 0.1, about one draw in a thousand is even enough.
"""


def by_dirichlet_blocks(
    labels: Labels, num_clients: int, rng: np.random.Generator, *, alpha: float = 0.5
) -> list[Indices]:
    """Draw Dirichlet shares in blocks of ten clients, so that no client gets much more than its part (FedDF, 2020).

    This partition of Lin et al. is also used by CReFF (Shang et al., 2022) and by methods that compare with it. The
    examples are shuffled and cut into ceil(K / 10) blocks of floor(10 N / K) examples for ten clients each; the last
    block has the remaining examples for the remaining clients. In a block of n examples and m clients, for the classes
    in order: draw p ~ Dir_m(alpha), set p_j to 0 for every client that already holds n / m or more, normalise, and cut
    the class at floor(cumsum(p) * n_c). A block is redrawn until its smallest client holds floor(n / (2 m)) or more.

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        alpha: Concentration; with smaller values a client holds fewer classes.

    Returns:
        K disjoint, sorted index arrays that hold every example.

    Raises:
        ValueError: If an option is out of range or none of 10,000 draws of a block is even enough.
    """
    require_clients(labels, num_clients)
    require_alpha(alpha)
    order = rng.permutation(len(labels))
    starts = np.arange(0, num_clients, BLOCK)
    clients: list[Indices] = []
    for block, start in zip(
        np.split(order, starts[1:] // BLOCK * (BLOCK * len(labels) // num_clients)), starts, strict=True
    ):
        clients += _shared_out(labels, block, min(BLOCK, num_clients - int(start)), rng, alpha)
    return clients


def _shared_out(
    labels: Labels, block: Indices, num_clients: int, rng: np.random.Generator, alpha: float
) -> list[Indices]:
    """Divide one block among its clients; its examples are in random order."""
    members = [block[labels[block] == label] for label in np.unique(labels[block])]
    smallest = len(block) // (2 * num_clients)
    for _ in range(MAX_BLOCK_REDRAWS):
        parts: list[list[Indices]] = [[] for _ in range(num_clients)]
        sizes = np.zeros(num_clients, dtype=np.int64)
        for mine in members:
            shares = np.where(sizes * num_clients >= len(block), 0, rng.dirichlet(np.full(num_clients, alpha)))
            sums = np.cumsum(shares)
            if not sums[-1] > 0:  # alpha so small that the open shares underflow
                break
            cuts = (sums[:-1] / sums[-1] * len(mine)).astype(np.int64)
            for part, piece in zip(parts, np.split(mine, cuts), strict=True):
                part.append(piece)
            sizes = np.array([sum(map(len, part)) for part in parts])
        else:
            if sizes.min() >= smallest:
                return [np.sort(np.concatenate(part)) for part in parts]
    raise ValueError(
        f"Expected `dirichlet_alpha` to leave every client at least half of an equal part of its block ({smallest} examples), "
        f"got none such in {MAX_BLOCK_REDRAWS} draws with alpha {alpha}, {num_clients} clients and {len(block)} examples in a block: "
        "raise the alpha, or change the number of clients or the seed."
    )


def by_dirichlet_balanced(
    labels: Labels, num_clients: int, rng: np.random.Generator, *, alpha: float = 0.5
) -> list[Indices]:
    """Create clients of equal size, each with separately drawn class proportions q ~ Dir(alpha * p) (Hsu et al., 2019).

    First, N - K * floor(N / K) examples are left out at random and stay unused; p are the class proportions of the
    others. For each client in order: draw q, and then floor(N / K) examples one by one, with classes drawn from q. A
    class that is used up gets proportion 0 from then on, and the other proportions are normalised. If all classes with
    a positive proportion are used up, classes are drawn in proportion to their remaining examples; the last clients
    thus get the examples that the others left.

    Args:
        labels: Labels of the training set, shape (N,).
        num_clients: Number of clients K.
        rng: Source of all draws.
        alpha: Concentration; with smaller values a client holds fewer classes.

    Returns:
        K disjoint, sorted index arrays of equal length.

    Raises:
        ValueError: If there are more clients than examples, or ``alpha`` is out of range.
    """
    require_clients(labels, num_clients)
    require_alpha(alpha)
    size = len(labels) // num_clients
    kept = rng.permutation(len(labels))[
        : num_clients * size
    ]  # examples left over at the end would come from the rarest classes
    members = [kept[labels[kept] == label] for label in np.unique(labels[kept])]
    sizes = np.array([len(mine) for mine in members])
    taken = np.zeros_like(sizes)
    clients = []
    for _ in range(num_clients):
        counts = _drawn_counts(_proportions(sizes / len(kept), alpha, rng), sizes - taken, size, rng)
        pieces = [mine[start : start + count] for mine, start, count in zip(members, taken, counts, strict=True)]
        clients.append(np.sort(np.concatenate(pieces)))
        taken += counts
    return clients


def _proportions(prior: npt.NDArray[np.float64], alpha: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw from Dir(alpha * prior); if its arithmetic underflows or overflows, return one class or the prior itself."""
    drawn = rng.dirichlet(alpha * prior) if (alpha * prior > 0).all() else np.full_like(prior, np.nan)
    if np.isfinite(drawn).all() and drawn.sum() > 0.5:
        return drawn
    return prior if alpha > 1 else rng.multinomial(1, prior).astype(np.float64)


def _drawn_counts(
    proportions: npt.NDArray[np.float64], left: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw ``size`` classes one by one, each at most as often as it has examples left, and return the counts."""
    counts = np.zeros_like(left)
    while (missing := size - int(counts.sum())) > 0:
        open_ = np.where(counts < left, proportions, 0)
        if not open_.sum() > 0:
            open_ = (left - counts).astype(np.float64)
        # draws of a class that is used up are repeated in the next pass
        counts = np.minimum(counts + rng.multinomial(missing, open_ / open_.sum()), left)
    return counts
