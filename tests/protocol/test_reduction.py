"""Average, mean and sum by prefix, against numbers by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedamm_pl.federation.aggregation import Reducer
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.protocol.reduction import Reduction, reduction_of

REDUCTIONS: dict[str, Reduction] = {"model.": "average", "moment.": "mean", "count.": "sum"}
SIZES = (1, 3)


def payload(w: float, n: int) -> dict[str, Tensor]:
    return {
        "model.w": torch.tensor([w]),
        "count.n": torch.tensor(n),
        "moment.w": torch.tensor(w),
        "model.n": torch.tensor(n),
    }


def reduced(*payloads: dict[str, Tensor], sizes: tuple[int, ...] = SIZES, **options: Any) -> dict[str, Any]:
    reducer = Reducer(REDUCTIONS, FederationConfig(1, **options))
    for state, size in zip(payloads, sizes, strict=True):
        reducer.add(state, size)
    return {name: value.tolist() for name, value in reducer.compute().items()}


def test_average_is_by_examples_mean_is_not_and_sum_adds_up() -> None:
    # (1 * 2 + 3 * 6) / 4 = 5, (2 + 6) / 2 = 4, 10 + 20 = 30, (1 * 10 + 3 * 20) / 4 = 17.5, rounded to even
    expected = {"model.w": [5.0], "moment.w": 4.0, "count.n": 30, "model.n": 18}
    assert reduced(payload(2.0, 10), payload(6.0, 20)) == expected


def test_uniform_aggregation_makes_means_of_averages() -> None:
    expected = {"model.w": [4.0], "moment.w": 4.0, "count.n": 30, "model.n": 15}
    assert reduced(payload(2.0, 10), payload(6.0, 20), aggregation="uniform") == expected


@pytest.mark.parametrize(("aggregation", "options"), [("median", {}), ("trimmed_mean", {"trim_fraction": 0.3})])
def test_robust_aggregations_take_the_place_of_averages_and_means_and_not_of_sums(
    aggregation: str, options: dict[str, float]
) -> None:
    payloads = [payload(2.0, 10), payload(3.0, 11), payload(1e9, 10**9)]
    expected = {"model.w": [3.0], "moment.w": 3.0, "count.n": 10**9 + 21, "model.n": 11}
    assert reduced(*payloads, sizes=(5, 5, 10**6), aggregation=aggregation, **options) == expected


def test_types_stay_and_sums_are_exact() -> None:
    reducer = Reducer({"": "sum"}, FederationConfig(1))
    for value in (2**40, 1, -(2**40)):
        reducer.add({"n": torch.tensor(value), "half": torch.tensor(0.5, dtype=torch.bfloat16)}, 7)
    found = reducer.compute()
    assert found["n"].dtype == torch.int64
    assert found["n"] == 1
    assert found["half"].dtype == torch.bfloat16
    assert found["half"] == 1.5


def test_nothing_to_reduce_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected states of a total weight above 0, got none"):
        Reducer(REDUCTIONS, FederationConfig(1)).compute()


def test_longest_prefix_decides() -> None:
    reductions: dict[str, Reduction] = {"": "sum", "model.": "average", "model.count": "mean", "model.count.x": "sum"}
    found = {
        name: reduction_of(name, reductions) for name in ("other", "model.w", "model.counts", "model.count.xy", "model")
    }
    expected = {"other": "sum", "model.w": "average", "model.counts": "mean", "model.count.xy": "sum", "model": "sum"}
    assert found == expected
    assert {name: reduction_of(name, dict(reversed(reductions.items()))) for name in found} == expected


def test_name_without_a_prefix_is_refused_by_name() -> None:
    problem = (
        r"Expected `shared` and `returned` to say how feature\.x is reduced, got \['count\.', 'model\.', 'moment\.'\]"
    )
    with pytest.raises(ValueError, match=problem):
        reduction_of("feature.x", REDUCTIONS)
    with pytest.raises(ValueError, match=problem):
        Reducer(REDUCTIONS, FederationConfig(1)).add({"model.w": torch.ones(1), "feature.x": torch.ones(1)}, 1)
