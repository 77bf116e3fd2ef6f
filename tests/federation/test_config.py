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
        ("lr_decay", [0.0, -0.5, 1.5, NAN], r"`lr_decay` to be in \(0, 1\]"),
        ("server_optimizer", ["sgd", ""], "`server_optimizer` to be one of none, momentum, adagrad, adam, yogi"),
        ("server_beta2", [-0.1, 1.1, NAN], r"`server_beta2` to be in \[0, 1\]"),
        ("server_tau", [0.0, -1.0, NAN, INFINITY], "`server_tau` to be a number above 0"),
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
        ("lr_decay", [1e-9, 1.0]),
        ("server_optimizer", ["none", "momentum", "adagrad", "adam", "yogi"]),
        ("server_beta2", [0.0, 1.0]),
        ("server_tau", [1e-9]),
        ("min_success_fraction", [0.0, 1.0]),
        ("aggregation", ["num_examples", "uniform", "median", "trimmed_mean"]),
    ],
)
def test_the_ends_of_a_range_are_taken(option: str, values: list[Any]) -> None:
    for value in values:
        config = FederationConfig(**{"num_rounds": 1, option: value})
        assert getattr(config, option) == value
        assert config.robust == (value in ("median", "trimmed_mean"))


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("server_lr", [0.0, -1.0, NAN, INFINITY], "`server_lr` to be a number above 0 or null"),
        ("server_momentum", [-0.1, 1.0, NAN], r"`server_momentum` to be in \[0, 1\) or null"),
    ],
)
def test_options_of_the_server_optimizer_need_one(option: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{message}, got {value!r}"):
            FederationConfig(1, server_optimizer="adam", **{option: value})
    with pytest.raises(ValueError, match=f"Expected `{option}` with a `server_optimizer`, got 0.5 with none"):
        FederationConfig(1, **{option: 0.5})
    assert getattr(FederationConfig(1, server_optimizer="yogi", **{option: 0.5}), option) == 0.5


def test_it_cannot_be_changed_and_a_change_is_checked() -> None:
    config = FederationConfig(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_rounds = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="`local_epochs`"):
        dataclasses.replace(config, local_epochs=0)
