"""How the server makes one state of many."""

from typing import Any

import numpy as np
import pytest
import torch

from fedamm_pl.federation.aggregation import Reducer, Sum, WeightedAverage, clip_update, update_norm
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.reduction import Reduction


def average(states: list[State], weights: list[float]) -> State:
    running = WeightedAverage()
    for state, weight in zip(states, weights, strict=True):
        running.add(state, weight)
    return running.compute()


def random_states(count: int) -> list[State]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "weight": torch.randn(3, 5, generator=generator),
            "half": torch.randn(4, generator=generator).bfloat16(),
            "num_batches_tracked": torch.randint(1000, (), generator=generator),
        }
        for _ in range(count)
    ]


def test_equals_numpy_average_in_float64() -> None:
    states, weights = random_states(7), [3.0, 1, 4, 1, 5, 9, 2]
    result = average(states, weights)
    for name in ("weight", "half"):
        stacked = np.stack([state[name].double().numpy() for state in states])
        expected = torch.from_numpy(np.average(stacked, axis=0, weights=weights)).to(result[name].dtype)
        assert torch.equal(result[name], expected)


def test_integer_buffers_are_rounded_to_nearest_and_stay_integers() -> None:
    result = average([{"n": torch.tensor(10)}, {"n": torch.tensor(13)}], [1, 2])
    assert result["n"].dtype == torch.int64
    assert result["n"] == 12


def test_order_changes_no_bit() -> None:
    states, weights = random_states(50), [float(weight) for weight in range(1, 51)]
    forwards, backwards = average(states, weights), average(states[::-1], weights[::-1])
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_one_state_comes_back_exactly() -> None:
    (state,) = random_states(1)
    result = average([state], [619])
    assert all(torch.equal(result[name], value) and result[name].dtype == value.dtype for name, value in state.items())


def test_states_given_are_not_changed() -> None:
    states = random_states(2)
    copies = [{name: value.clone() for name, value in state.items()} for state in states]
    average(states, [1, 1])
    assert all(
        torch.equal(state[name], copy[name]) for state, copy in zip(states, copies, strict=True) for name in copy
    )


@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_no_weight_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="total weight above 0"):
        average(random_states(len(weights)), weights)


# Sums, and several reductions side by side


def test_sums_know_no_weights() -> None:
    total = Sum()
    for weight in (0.0, 1.0, 7.0):
        total.add({"w": torch.tensor([1.5]), "n": torch.tensor(2)}, weight)
    assert total.compute() == {"w": torch.tensor([4.5]), "n": torch.tensor(6)}
    assert total.compute()["n"].dtype == torch.int64


REDUCTIONS: dict[str, Reduction] = {"model.": "average", "control.": "mean", "count.": "sum"}


def reduced(**options: Any) -> dict[str, float]:
    """Three clients of 1, 2 and 5 examples with the values 1, 2 and 9 in each entry."""
    reducer = Reducer(REDUCTIONS, FederationConfig(1, **options))
    for num_examples, value in ((1, 1.0), (2, 2.0), (5, 9.0)):
        reducer.add({name + "w": torch.tensor([value]) for name in REDUCTIONS}, num_examples)
    return {name: float(value) for name, value in reducer.compute().items()}


@pytest.mark.parametrize(
    ("options", "average", "mean"),
    [
        ({}, 50 / 8, 4.0),
        ({"aggregation": "uniform"}, 4.0, 4.0),
        ({"aggregation": "median"}, 2.0, 2.0),
        ({"aggregation": "trimmed_mean", "trim_fraction": 0.3}, 2.0, 2.0),
        # a robust mean knows no weights, also where it trims nobody
        ({"aggregation": "trimmed_mean", "trim_fraction": 1e-12}, 4.0, 4.0),
    ],
)
def test_each_entry_is_reduced_as_its_prefix_says(options: dict[str, Any], average: float, mean: float) -> None:
    assert reduced(**options) == pytest.approx({"model.w": average, "control.w": mean, "count.w": 12.0})


def test_an_entry_that_no_prefix_covers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`shared` and `returned` to say how other.w is reduced"):
        Reducer(REDUCTIONS, FederationConfig(1)).add({"other.w": torch.zeros(1)}, 1)


def test_nobody_is_nothing() -> None:
    with pytest.raises(ValueError, match="total weight above 0"):
        Reducer(REDUCTIONS, FederationConfig(1)).compute()


# Single updates


def test_the_length_of_an_update_is_over_all_floats() -> None:
    sent = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(1.0).bfloat16(), "n": torch.tensor(5)}
    payload = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor(5.0).bfloat16(), "n": torch.tensor(500)}
    assert update_norm(payload, sent) == 5.0
    assert update_norm(payload, {"n": sent["n"]}) == 0.0
    assert update_norm({**payload, "b": torch.tensor(torch.nan)}, sent).isnan()


def test_a_shortened_update_points_the_same_way() -> None:
    sent = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}
    payload = {"a": torch.tensor([1.0, 6.0]), "n": torch.tensor(7)}
    short = clip_update(payload, sent, 0.25)
    assert short["a"].tolist() == [1.0, 3.0]
    assert short["n"] == 7
    assert update_norm(short, sent) == 0.25 * update_norm(payload, sent)
    assert payload["a"].tolist() == [1.0, 6.0]
