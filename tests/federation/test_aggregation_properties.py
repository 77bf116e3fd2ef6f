"""Averages of states for any values, weights and numbers of clients, against exact fractions."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamm_pl.federation.aggregation import Aggregate, TrimmedMean, WeightedAverage, num_trimmed
from fedamm_pl.protocol.messages import State

# A failure has to come back in the next run, and nothing may depend on what is on the disk.
REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=100)

# Multiples of 2 ** -20 below 16 and small whole weights: sums in float64 are exact, so that equal means equal bits.
GRID = st.integers(-(2**24) + 1, 2**24 - 1).map(lambda k: k / 2**20)
WHOLE = st.integers(1, 1000)
# Any numbers of a size that a network may have, subnormal ones included.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
WEIGHTS = st.floats(1e-3, 1e6)
INTEGERS = {
    torch.int64: st.integers(-(2**40), 2**40),
    torch.int32: st.integers(-(2**31), 2**31 - 1),
    torch.uint8: st.integers(0, 255),
}

Clients = list[tuple[list[float], float]]
"""Values and weight of each client."""


def clients(values: st.SearchStrategy[float], weights: st.SearchStrategy[float]) -> st.SearchStrategy[Clients]:
    """One to twelve clients, each with a weight and as many values as the others."""
    return st.integers(1, 4).flatmap(
        lambda size: st.lists(
            st.tuples(st.lists(values, min_size=size, max_size=size), weights), min_size=1, max_size=12
        )
    )


def average(some: Clients, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weighted average of the values."""
    return aggregated(WeightedAverage(), some, dtype)


def aggregated(aggregate: Aggregate, some: Clients, dtype: torch.dtype) -> torch.Tensor:
    """The aggregate of the values, which are put into states of two entries and taken out again."""
    for values, weight in some:
        state = {"scalar": torch.tensor(values[0], dtype=dtype), "row": torch.tensor([values], dtype=dtype)}
        aggregate.add(state, weight)
    result: State = aggregate.compute()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in result.items()} == {
        "scalar": (dtype, ()),
        "row": (dtype, (1, len(some[0][0]))),
    }
    row = result["row"][0]
    assert same(result["scalar"], row[0])
    return row


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN equals NaN."""
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def exact_means(some: Clients) -> list[Fraction]:
    total = sum(Fraction(weight) for _, weight in some)
    columns = zip(*(values for values, _ in some), strict=True)
    return [
        sum((Fraction(weight) * Fraction(value) for value, (_, weight) in zip(column, some, strict=True)), Fraction(0))
        / total
        for column in columns
    ]


@given(some=clients(GRID, WHOLE))
@REPEATABLE
def test_equals_exact_fractions_rounded_once(some: Clients) -> None:
    expected = np.array([float(mean) for mean in exact_means(some)]).astype(np.float32)
    assert average(some).tolist() == expected.tolist()


@given(some=clients(FLOATS, WEIGHTS))
@REPEATABLE
def test_is_within_rounding_of_exact_fractions_for_any_numbers(some: Clients) -> None:
    for column, (mean, exact) in enumerate(zip(average(some).tolist(), exact_means(some), strict=True)):
        largest = max(abs(values[column]) for values, _ in some)
        # half a unit of float32 for the result, and of float64 for each client
        slack = Fraction(float(np.spacing(np.float32(float(abs(exact)))))) * Fraction(51, 100)
        assert abs(Fraction(mean) - exact) <= slack + Fraction(largest) * len(some) / 2**50


@given(some=clients(FLOATS, WEIGHTS))
@REPEATABLE
def test_lies_between_smallest_and_largest_in_every_coordinate(some: Clients) -> None:
    stacked = np.array([values for values, _ in some], dtype=np.float32)
    mean = average(some).numpy()
    assert (stacked.min(0) <= mean).all()
    assert (mean <= stacked.max(0)).all()


@given(some=clients(GRID, WHOLE), data=st.data())
@REPEATABLE
def test_order_of_the_clients_changes_no_bit_where_sums_are_exact(some: Clients, data: st.DataObject) -> None:
    assert torch.equal(average(some), average(data.draw(st.permutations(some))))


@given(seed=st.integers(0, 2**32), num_clients=st.integers(1, 60))
@REPEATABLE
def test_order_of_the_clients_changes_no_bit_of_parameters_as_networks_have_them(seed: int, num_clients: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((num_clients, 50)).astype(np.float32) * 0.1
    some = [(mine.tolist(), float(rng.integers(1, 5000))) for mine in values]
    assert torch.equal(average(some), average([some[client] for client in rng.permutation(num_clients)]))


@given(some=clients(FLOATS, WEIGHTS), power=st.integers(-40, 40))
@REPEATABLE
def test_weights_times_a_power_of_two_change_no_bit(some: Clients, power: int) -> None:
    scaled = [(values, weight * 2.0**power) for values, weight in some]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(average(scaled, dtype), average(some, dtype))


@given(some=clients(GRID, WHOLE), factor=st.floats(1e-6, 1e6))
@REPEATABLE
def test_weights_times_any_number_change_nothing_beyond_rounding(some: Clients, factor: float) -> None:
    scaled = average([(values, weight * factor) for values, weight in some], torch.float64)
    assert torch.allclose(scaled, average(some, torch.float64), rtol=0, atol=1e-13)


@given(values=st.lists(FLOATS, min_size=1, max_size=8), weights=st.lists(WEIGHTS, min_size=1, max_size=12))
@REPEATABLE
def test_equal_states_come_back_exactly(values: list[float], weights: list[float]) -> None:
    some = [(values, weight) for weight in weights]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(average(some, dtype), torch.tensor(values, dtype=dtype))


@given(some=clients(GRID, WHOLE), weight=WHOLE, data=st.data())
@REPEATABLE
def test_a_client_that_comes_twice_has_twice_the_weight(some: Clients, weight: int, data: st.DataObject) -> None:
    values, _ = data.draw(st.sampled_from(some))
    twice, doubled = [*some, (values, weight), (values, weight)], [*some, (values, 2 * weight)]
    assert torch.equal(average(twice), average(doubled))


@given(some=clients(FLOATS, WEIGHTS), ignored=clients(FLOATS, st.just(0.0)))
@REPEATABLE
def test_a_client_without_weight_changes_nothing(some: Clients, ignored: Clients) -> None:
    size = len(some[0][0])
    added = [((values * size)[:size], weight) for values, weight in ignored]
    assert torch.equal(average([*added, *some]), average(some))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(data=st.data())
@REPEATABLE
def test_integers_are_the_exact_mean_rounded_to_nearest(dtype: torch.dtype, data: st.DataObject) -> None:
    some = data.draw(clients(INTEGERS[dtype], WHOLE))
    # to the even one of two that are equally near, as Python rounds fractions
    assert average(some, dtype).tolist() == [round(mean) for mean in exact_means(some)]


@given(flags=st.lists(st.booleans(), min_size=1, max_size=12))
@REPEATABLE
def test_flags_go_by_majority(flags: list[bool]) -> None:
    result = average([([flag], 1.0) for flag in flags], torch.bool)
    assert result.dtype == torch.bool
    assert result.item() == (2 * sum(flags) > len(flags))


@given(some=clients(FLOATS, WEIGHTS))
@REPEATABLE
def test_states_given_and_a_result_taken_are_left_alone(some: Clients) -> None:
    states = [{"row": torch.tensor(values)} for values, _ in some]
    running = WeightedAverage()
    for state, (_, weight) in zip(states, some, strict=True):
        running.add(state, weight)
    first = running.compute()
    kept = first["row"].clone()
    assert torch.equal(running.compute()["row"], kept)
    running.add(states[0], 1.0)
    assert torch.equal(first["row"], kept)
    assert all(state["row"].tolist() == values for state, (values, _) in zip(states, some, strict=True))


# Trimmed means

FRACTIONS = st.integers(0, 50).map(lambda percent: percent / 100) | st.sampled_from([0.0, 0.5])


def trimmed(some: Clients, fraction: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return aggregated(TrimmedMean(fraction), some, dtype)


@pytest.mark.parametrize("percent", range(51))
def test_number_trimmed_is_that_of_exact_decimals(percent: int) -> None:
    for num_states in range(1, 400):
        wanted = -(-percent * num_states // 100)  # in floating point 0.07 * 100 is above 7
        assert num_trimmed(num_states, percent / 100) == min(wanted, (num_states - 1) // 2)


def sorted_slice_mean(column: Sequence[float], percent: int) -> Fraction:
    """The mean of what is left of a sorted column, in exact fractions."""
    cut = min(math.ceil(Fraction(percent, 100) * len(column)), (len(column) - 1) // 2)
    kept = sorted(map(Fraction, column))[cut : len(column) - cut]
    return sum(kept, Fraction(0)) / len(kept)


@given(some=clients(GRID, WEIGHTS), percent=st.integers(0, 50))
@REPEATABLE
def test_trimmed_mean_equals_the_exact_mean_of_a_sorted_slice(some: Clients, percent: int) -> None:
    columns = zip(*(values for values, _ in some), strict=True)
    expected = np.array([float(sorted_slice_mean(column, percent)) for column in columns]).astype(np.float32)
    assert trimmed(some, percent / 100).tolist() == expected.tolist()


@given(some=clients(FLOATS, WEIGHTS))
@REPEATABLE
def test_fraction_of_a_half_is_the_median(some: Clients) -> None:
    expected = np.median(np.array([values for values, _ in some]), axis=0).astype(np.float32)
    assert trimmed(some, 0.5).tolist() == expected.tolist()


@given(some=clients(GRID, WEIGHTS))
@REPEATABLE
def test_fraction_of_0_is_the_mean_without_weights(some: Clients) -> None:
    assert torch.equal(trimmed(some, 0.0), average([(values, 1.0) for values, _ in some]))


@given(some=clients(st.floats(width=32), WEIGHTS), fraction=FRACTIONS, data=st.data())
@REPEATABLE
def test_order_of_the_clients_changes_no_bit_of_a_trimmed_mean(
    some: Clients, fraction: float, data: st.DataObject
) -> None:
    forwards, other = trimmed(some, fraction), trimmed(data.draw(st.permutations(some)), fraction)
    assert same(forwards, other)  # zeros of either sign are equal


@given(some=clients(FLOATS, WEIGHTS), fraction=FRACTIONS)
@REPEATABLE
def test_trimmed_mean_lies_between_the_values_kept(some: Clients, fraction: float) -> None:
    stacked = np.sort(np.array([values for values, _ in some], dtype=np.float32), axis=0)
    cut = num_trimmed(len(some), fraction)
    mean = trimmed(some, fraction).numpy()
    assert (stacked[cut] <= mean).all()
    assert (mean <= stacked[len(some) - 1 - cut]).all()


@given(
    honest=clients(FLOATS, WEIGHTS).filter(lambda some: len(some) >= 2),
    bad=st.lists(st.floats(width=32), min_size=1, max_size=6),
    fraction=FRACTIONS,
    data=st.data(),
)
@REPEATABLE
def test_as_many_bad_clients_as_are_trimmed_never_move_it_out_of_the_range_of_the_honest(
    honest: Clients, bad: list[float], fraction: float, data: st.DataObject
) -> None:
    size = len(honest[0][0])
    # each sends one value everywhere: infinite, not a number or any other
    attackers = [([value] * size, 1e6) for value in bad]
    while len(attackers) > num_trimmed(len(honest) + len(attackers), fraction):
        attackers.pop()
    mean = trimmed(data.draw(st.permutations([*honest, *attackers])), fraction).numpy()
    stacked = np.array([values for values, _ in honest], dtype=np.float32)
    assert (stacked.min(0) <= mean).all()
    assert (mean <= stacked.max(0)).all()


@given(
    honest=clients(FLOATS, WEIGHTS).filter(lambda some: len(some) >= 2),
    bad=st.floats(width=32),
    place=st.integers(0, 12),
)
@REPEATABLE
def test_one_bad_client_never_moves_the_median_out_of_the_range_of_the_others(
    honest: Clients, bad: float, place: int
) -> None:
    some = list(honest)
    some.insert(place, ([bad] * len(honest[0][0]), 1e6))
    median = trimmed(some, 0.5).numpy()
    stacked = np.array([values for values, _ in honest], dtype=np.float32)
    assert (stacked.min(0) <= median).all()
    assert (median <= stacked.max(0)).all()


@given(values=st.lists(FLOATS, min_size=1, max_size=8), count=st.integers(1, 12), fraction=FRACTIONS)
@REPEATABLE
def test_trimmed_mean_of_equal_states_is_that_state(values: list[float], count: int, fraction: float) -> None:
    assert torch.equal(trimmed([(values, 1.0)] * count, fraction), torch.tensor(values))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(data=st.data(), percent=st.integers(0, 50))
@REPEATABLE
def test_trimmed_mean_of_integers_is_rounded_to_nearest(dtype: torch.dtype, data: st.DataObject, percent: int) -> None:
    some = data.draw(clients(INTEGERS[dtype], WEIGHTS))
    columns = zip(*(values for values, _ in some), strict=True)
    expected = [round(sorted_slice_mean(column, percent)) for column in columns]
    assert trimmed(some, percent / 100, dtype).tolist() == expected


@given(some=clients(FLOATS, WEIGHTS), ignored=clients(FLOATS, st.just(0.0)), fraction=FRACTIONS)
@REPEATABLE
def test_trimmed_mean_leaves_out_clients_without_weight(some: Clients, ignored: Clients, fraction: float) -> None:
    size = len(some[0][0])
    added = [((values * size)[:size], weight) for values, weight in ignored]
    assert torch.equal(trimmed([*added, *some], fraction), trimmed(some, fraction))


@given(fraction=st.floats().filter(lambda fraction: not 0 <= fraction <= 0.5))
@REPEATABLE
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `trim_fraction` to be in \[0, 0\.5\], got"):
        TrimmedMean(fraction)
