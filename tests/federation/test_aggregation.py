import numpy as np
import pytest
import torch

from fedamm_pl.federation.aggregation import WeightedAverage
from fedamm_pl.protocol.messages import State


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
