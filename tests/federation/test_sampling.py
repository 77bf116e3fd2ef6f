import pytest

from fedamm_pl.federation.sampling import num_sampled, sample_clients


@pytest.mark.parametrize(
    ("num_clients", "fraction", "expected"),
    [(20, 0.5, 10), (10, 0.3, 3), (10, 0.29, 2), (100, 0.07, 7), (5, 0.01, 1), (3, 1.0, 3), (1, 0.5, 1)],
)
def test_number_of_clients_is_the_floor_but_at_least_one(num_clients: int, fraction: float, expected: int) -> None:
    assert num_sampled(num_clients, fraction) == expected
    assert len(sample_clients(num_clients, fraction, 0, 1)) == expected


def test_clients_are_a_function_of_seed_and_round() -> None:
    draws = [sample_clients(50, 0.2, seed, round_num) for seed in (0, 1) for round_num in (1, 2)]
    assert draws == [sample_clients(50, 0.2, seed, round_num) for seed in (0, 1) for round_num in (1, 2)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_clients_are_distinct_and_sorted_and_all_are_drawn_in_the_end() -> None:
    seen: set[int] = set()
    for round_num in range(1, 60):
        draw = sample_clients(20, 0.5, 0, round_num)
        assert draw == sorted(set(draw))
        seen.update(draw)
    assert seen == set(range(20))
