"""Which clients take part in a round."""

from fedamm_pl.seeding import numpy_generator


def num_sampled(num_clients: int, client_fraction: float) -> int:
    """Return max(floor(client_fraction * K + 1e-9), 1), the number of clients of a round.

    Example:
        >>> num_sampled(20, 0.5), num_sampled(10, 0.29999999999999999), num_sampled(5, 0.01)
        (10, 3, 1)
    """
    return max(int(client_fraction * num_clients + 1e-9), 1)


def sample_clients(num_clients: int, client_fraction: float, seed: int, round_num: int) -> list[int]:
    """Draw the clients of a round without replacement, sorted; a function of (seed, round).

    Args:
        num_clients: Number of clients K.
        client_fraction: Share of them that takes part, in (0, 1].
        seed: Seed of the run.
        round_num: The round.
    """
    rng = numpy_generator(seed, "sampling", round_num)
    chosen = rng.choice(num_clients, num_sampled(num_clients, client_fraction), replace=False)
    return sorted(int(client) for client in chosen)
