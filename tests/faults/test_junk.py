"""Whatever one client's result is made of, the round ends with the mean of the others, and counts one failure."""

import dataclasses
import logging
import math
from collections import UserDict
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamm_pl.algorithms import CCVR, CRT, RUCR, Climb, CReFF, FedAMM, FedAvg, FedNH, FedNova, FedYoYo, Scaffold
from fedamm_pl.federation.executors import RunSpec
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask
from fedamm_pl.protocol.module import FederatedModule
from tests.faults.faulty import CPU, Returning
from tests.faults.test_clients import assert_equal, federation, finite, make, small_data

REPEATABLE = settings(deadline=None, derandomize=True, database=None)
CLIENTS, POISONED = (0, 1, 2, 3), 2
OPTIONS: dict[type[FederatedModule], dict[str, Any]] = {
    FedAvg: {},
    FedAMM: {"differentiation": "forward"},
    FedNova: {},
    Climb: {},
    Scaffold: {},
    FedYoYo: {},
    RUCR: {},
    CReFF: {"match_steps": 2, "retrain_steps": 2},
    FedNH: {},
    CRT: {"where": "clients", "stage2_start": 1},
}


class Hostile:
    """Raises whatever one does with it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("hands off")

    def __repr__(self) -> str:
        raise RuntimeError("hands off")


class HostileMapping(UserDict[Any, Any]):
    """A mapping that cannot be read."""

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("hands off")


class HostileNumber(float):
    """A number that is none when one takes it for one."""

    def __float__(self) -> float:
        raise RuntimeError("hands off")


class HostileTensor(torch.Tensor):
    """A tensor that cannot be looked at."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("hands off")


def hostile_tensor() -> torch.Tensor:
    return torch.zeros(2).as_subclass(HostileTensor)


TEXTS = st.sampled_from(
    ["", "low", "30", "\x1b[2J\x1b[31m", "a\nround 9: all is well", "\u202elive", "\ud800", "x" * 10**5]
)
OTHER_KINDS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    TEXTS,
    st.binary(max_size=3),
    st.builds(object),
    st.builds(Hostile),
    st.builds(HostileMapping, st.just({"loss": 1.0})),
    st.builds(hostile_tensor),
    st.just([0]),
    st.just({3: 4}),
    st.just({"\x1b[2J": torch.zeros(1, device="meta")}),
    st.just(1j),
    st.just(Decimal(1)),
    st.just(torch.zeros(3)),
    st.just(torch.tensor(30)),
    st.just(ClientResult),
    st.builds(type("a\x1b[2J\nb", (), {})),
)
NO_COUNTS = OTHER_KINDS | st.sampled_from([0, -1, 2**53 + 1, 10**30, 10**5000, True, 2.0, math.nan, HostileNumber(3)])
NO_SIZES = OTHER_KINDS | st.sampled_from([-1, 2**53 + 1, 10**30, 10**5000, False, 2.0, math.nan, HostileNumber(3)])
NO_SECONDS = OTHER_KINDS | st.sampled_from([-1e-9, math.nan, math.inf, -math.inf, 1e9, 10**400, True, HostileNumber(3)])
NO_METRICS = OTHER_KINDS | st.sampled_from([1e200, -1e39, math.inf, 10**400, Fraction(10**100), HostileNumber(3)])
NO_NAMES = st.sampled_from(
    [3, None, "", "a\nb", "\x1b[2J", "\u202e", "\ud800", "x" * 201, "loss_std", "bytes_sent", (1, 2)]
)
NO_MAPPINGS = OTHER_KINDS.filter(lambda value: type(value) is not dict)
CONTRIBUTED = {
    "num_steps": [0, -1, 10**7, 2**62],
    "global_loss": [-1.0, -1e30],
    "present": [2, -1, 2**62],
    "class_means": [0.5, -1e30],
    "class_counts": [-1, 2**53 + 1, 2**62],
    "features.counts": [-1, 2**62],
    "features.sums": [1e200, -1e200],
    "features.products": [-1.0, 1e200],
    "effective_numbers": [-1.0, 1e12],
    "running_var": [-1e-3, -5.0],
    "num_batches_tracked": [-1, -(2**62)],
}
"""Ends of names -> numbers that are finite and cannot be."""


@st.composite
def junk(draw: st.DrawFn, honest: ClientResult) -> Any:
    """Something else than an honest result, by one field."""
    field = draw(st.sampled_from(["all", "failure", *(one.name for one in dataclasses.fields(ClientResult))]))
    if field == "all":
        return draw(OTHER_KINDS)
    if field == "failure":
        stage, reason = draw(OTHER_KINDS | st.just("data")), draw(OTHER_KINDS)
        return ClientFailure(POISONED, stage, reason)
    if field == "client_id":
        value = draw(OTHER_KINDS | st.sampled_from([True, 2.0, -1, 2**53 + 1, 10**5000, math.nan]))
    elif field == "num_examples":
        value = draw(NO_COUNTS)
    elif field in ("bytes_received", "bytes_sent"):
        value = draw(NO_SIZES)
    elif field in ("train_seconds", "meta_seconds"):
        value = draw(NO_SECONDS)
    elif field == "metrics":
        named = st.builds(lambda name: {name: 1.0}, NO_NAMES) | st.builds(lambda value: {"loss": value}, NO_METRICS)
        value = draw(named | NO_MAPPINGS | st.just({f"m{number}": 1.0 for number in range(20_000)}))
    elif field == "kept":
        unkept = [
            torch.zeros(1, device="meta"),
            torch.eye(2).to_sparse(),
            torch.zeros(1).expand(2**50),
            torch.ones(1) * 1j,
        ]
        values = st.sampled_from(unkept) | OTHER_KINDS.filter(lambda value: type(value) is not torch.Tensor)
        value = draw(NO_MAPPINGS | st.builds(lambda value: {"a": value}, values))
    else:
        value = draw(mutated(getattr(honest, field)))
    return dataclasses.replace(honest, **{field: value})


@st.composite
def mutated(draw: st.DrawFn, state: dict[str, torch.Tensor]) -> Any:
    """Tensors by name of which something is wrong."""
    kinds = ["mapping", "more"] + (["less", "value", "number", "impossible"] if state else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "mapping":
        return draw(NO_MAPPINGS)
    if kind == "more":
        return {**state, draw(st.sampled_from(["more", 3, "\x1b[2J", "x" * 10**5])): torch.zeros(2)}
    name = draw(st.sampled_from(sorted(state)))
    rest, value = {other: entry for other, entry in state.items() if other != name}, state[name]
    if kind == "less":
        return rest
    impossible = next((numbers for end, numbers in CONTRIBUTED.items() if name.endswith(end)), None)
    if kind == "impossible" and impossible:
        return {**rest, name: torch.full_like(value, draw(st.sampled_from(impossible)))}
    if kind == "number" and value.is_floating_point():
        spoiled = value.clone()
        spoiled.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(
            st.sampled_from([math.nan, math.inf, -math.inf])
        )
        return {**rest, name: spoiled}
    others = [
        value[None],
        value.to(torch.complex64),
        value.to("meta"),
        value.to_sparse(),
        value.tolist(),
        value.numpy(),
    ]
    return {**rest, name: draw(OTHER_KINDS | st.sampled_from(others))}


def honest_results(algorithm: type[FederatedModule]) -> list[ClientResult]:
    data = small_data()
    module = make(algorithm, data, **OPTIONS[algorithm])
    run, _ = federation(module, data, num_rounds=1)
    worker = Worker(RunSpec(make(algorithm, data, **OPTIONS[algorithm]), data, CPU, seed=0, threads=1))
    worker.begin(Broadcast(1, 1, run.server.broadcast(run.state.shared, 1, 1).payload))
    results = [worker.train(ClientTask(client, client), {}) for client in CLIENTS]
    assert all(isinstance(result, ClientResult) for result in results)
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("algorithm", OPTIONS)
def test_junk_costs_one_client(algorithm: type[FederatedModule], caplog: pytest.LogCaptureFixture) -> None:
    data, honest = small_data(), honest_results(algorithm)

    def round_of(outcomes: list[Any]) -> Any:
        module = make(algorithm, data, **OPTIONS[algorithm])
        run, recorder = federation(module, data, num_rounds=1, executor=Returning(outcomes))
        run.run()
        return run, recorder.records[1]

    others = [result for result in honest if result.client_id != POISONED]
    expected, _ = round_of(others)

    @given(what=junk(honest[POISONED]))
    @settings(REPEATABLE, max_examples=120 if algorithm is FedAvg else 40)
    def check(what: Any) -> None:
        caplog.clear()
        outcomes: list[Any] = list(honest)
        outcomes[POISONED] = what
        run, record = round_of(outcomes)
        assert len(record.failures) == 1
        (failure,) = record.failures
        assert failure.client_id == POISONED
        assert failure.reason.isprintable()
        assert len(failure.reason) <= 300
        assert sum(run.state.counts.values()) == 1
        assert run.state.counts["failed_rounds"] == 0
        assert finite(run.state.shared)
        assert_equal(run.state.shared, expected.state.shared)
        assert_equal(run.module.shared_state(), expected.module.shared_state())
        lines = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert 1 <= len(lines) <= 2
        assert all(line.isprintable() and len(line) < 500 for line in lines)

    check()


def test_junk_among_statistics_costs_one_client(caplog: pytest.LogCaptureFixture) -> None:
    """Of a round without training: nobody has trained, since statistics are no models."""
    data, options = small_data(), {"num_features": 5, "retrain_epochs": 1}
    run, _ = federation(make(CCVR, data, **options), data, num_rounds=1)
    worker = Worker(RunSpec(make(CCVR, data, **options), data, CPU, seed=0, threads=1))
    worker.begin(Broadcast(1, 0, run.server.broadcast(run.state.shared, 1, 0).payload))
    honest = [worker.train(ClientTask(client, client), {}) for client in CLIENTS]

    def calibrated(outcomes: list[Any]) -> Any:
        run, _ = federation(make(CCVR, data, **options), data, num_rounds=1, executor=Returning(outcomes))
        with suppress(FederationError):  # none has trained
            run.run()
        return run

    expected = calibrated([result for result in honest if result.client_id != POISONED])  # type: ignore[union-attr]
    assert any(name.startswith("calibrated.") for name in expected.state.shared)

    @given(what=junk(honest[POISONED]))  # type: ignore[arg-type]
    @settings(REPEATABLE, max_examples=60)
    def check(what: Any) -> None:
        caplog.clear()
        outcomes: list[Any] = list(honest)
        outcomes[POISONED] = what
        run = calibrated(outcomes)
        assert_equal(run.state.shared, expected.state.shared)
        assert sum(run.state.counts.values()) == sum(expected.state.counts.values())
        lines = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert all(line.isprintable() and len(line) < 500 for line in lines)

    check()
