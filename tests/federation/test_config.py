import dataclasses
from typing import Any

import pytest

from fedamm_pl.federation.config import FederationConfig

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("num_rounds", [-1], "`num_rounds` to be 0 or more"),
        ("client_fraction", [0.0, -0.1, 1.1, NAN, INFINITY], r"`client_fraction` to be in \(0, 1\]"),
        ("local_epochs", [0, -1], "`local_epochs` to be 1 or more"),
        ("eval_interval", [0], "`eval_interval` to be 1 or more"),
        ("max_failed_rounds", [0], "`max_failed_rounds` to be 1 or more"),
        ("aggregation", ["mode", ""], "`aggregation` to be one of num_examples, uniform, median, trimmed_mean"),
        ("trim_fraction", [0.0, 0.6, NAN], r"`trim_fraction` to be in \(0, 0.5\]"),
        ("max_update_norm", [0.0, -1.0, NAN, INFINITY], "`max_update_norm` to be a number above 0 or null"),
        ("min_success_fraction", [-0.1, 1.1, NAN], r"`min_success_fraction` to be in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(option: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{message}, got {value!r}"):
            FederationConfig(**{"num_rounds": 1, option: value})


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("num_rounds", [0]),
        ("client_fraction", [1e-9, 1.0]),
        ("trim_fraction", [0.5]),
        ("max_update_norm", [None, 1e-9]),
        ("min_success_fraction", [0.0, 1.0]),
        ("aggregation", ["num_examples", "uniform", "median", "trimmed_mean"]),
    ],
)
def test_the_ends_of_a_range_are_taken(option: str, values: list[Any]) -> None:
    for value in values:
        config = FederationConfig(**{"num_rounds": 1, option: value})
        assert getattr(config, option) == value
        assert config.robust == (value in ("median", "trimmed_mean"))


def test_it_cannot_be_changed_and_a_change_is_checked() -> None:
    config = FederationConfig(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_rounds = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="`local_epochs`"):
        dataclasses.replace(config, local_epochs=0)
