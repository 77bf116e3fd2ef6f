"""What the server takes in from clients, and what it refuses."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl import FedAMM
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.intake import (
    MAX_COLUMNS,
    Intake,
    RoundFailedError,
    client_metrics,
    outlier,
    require_sound,
    within_columns,
)
from fedamm_pl.federation.soundness import MAX_METRIC, MAX_WHOLE
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, ClientTask, State
from tests.federation.small import make
from tests.tiny import tiny_data

EXPECTED: State = {"model.w": torch.zeros(2), "model.n": torch.tensor(3), "control.w": torch.zeros(2)}
SOUND: State = {"model.w": torch.tensor([3.0, 4.0]), "model.n": torch.tensor(9), "control.w": torch.ones(2) * 100}
SHARED = ("model.",)


def result(client: Any = 0, num_examples: Any = 4, payload: Any = None, **more: Any) -> ClientResult:
    return ClientResult(client, num_examples, SOUND if payload is None else payload, **more)


def test_a_state_that_is_not_finite_fails_the_round() -> None:
    assert require_sound(EXPECTED) == EXPECTED
    with pytest.raises(RoundFailedError, match=r"the server's update made model\.w NaN or infinite"):
        require_sound({**EXPECTED, "model.w": torch.tensor([torch.inf, 0])})
    with pytest.raises(RoundFailedError, match=r"the server's update put model\.n below 0"):
        require_sound({**EXPECTED, "model.n": torch.tensor(-1)}, ["model.n", "model.m"])


# A round


class Method(nn.Module):
    """What the intake asks of a method."""

    shared = SHARED

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()

    def tallies(self) -> State:
        return {}


def accepted(
    outcomes: list[Any], clients: int = 4, contribution: Any = None, **options: Any
) -> tuple[Intake, list[Any]]:
    """The intake after a round, and what it passed on."""
    tasks = [ClientTask(client, client) for client in range(clients)]
    intake = Intake(7, tasks, EXPECTED, Method(), FederationConfig(1, **{"min_success_fraction": 0, **options}))  # type: ignore[arg-type]
    told: list[ClientResult] = []
    passed = list(intake.accept(outcomes, contribution or (lambda result: result), told.append))
    assert [one.client_id for one in told] == [one.client_id for one in intake.results]
    assert all(one.payload == {} and one.tallies == {} for one in told)
    return intake, passed


def test_what_is_sound_is_passed_on_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = [
        result(0, kept={"c": torch.ones(1)}),
        ClientFailure(1, "training", "it rains"),
        result(2, num_examples=-1),
    ]
    intake, passed = accepted(outcomes)
    assert [one.client_id for one in passed] == [0]
    assert intake.results == [dataclasses.replace(outcomes[0], payload={}, kept={})]
    assert intake.norms == {0: 5.0}
    assert intake.failures == [
        ClientFailure(1, "training", "it rains"),
        ClientFailure(2, "update", "it reports -1 examples"),
        ClientFailure(3, "lost", "nothing came back"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "round 7: client 1 failed (training): it rains",
        "round 7: the update of client 2 is refused: it reports -1 examples",
        "round 7: client 3 failed (lost): nothing came back",
    ]


def test_clients_are_called_by_their_names(caplog: pytest.LogCaptureFixture) -> None:
    tasks, long = (
        [ClientTask(client, client) for client in range(4)],
        {**SOUND, "model.w": torch.tensor([300.0, 400.0])},
    )
    outcomes = [result(0, payload=long), result(1), result(2), ClientFailure(3, "data", "it rains")]
    config = FederationConfig(1, min_success_fraction=0)
    intake = Intake(7, tasks, EXPECTED, Method(), config, ["north", "a\nb", "c", "south" * 20])  # type: ignore[arg-type]
    list(intake.accept(outcomes, lambda result: result, lambda result: None))
    failed, outlying = (record.getMessage() for record in caplog.records)
    assert failed == f"round 7: client '{('south' * 20)[:39]}…' failed (data): it rains"
    assert outlying.startswith("round 7: the update of client 'north' is 100 times as long")
    intake = Intake(7, tasks, EXPECTED, Method(), FederationConfig(1), ["north", "a\nb", "c", "south"])  # type: ignore[arg-type]
    with pytest.raises(RoundFailedError, match=r"the last to fail: client 'south' failed \(lost\): nothing came back"):
        list(intake.accept([ClientFailure(1, "data", "it rains")], lambda result: result, lambda result: None))
    assert r"round 7: client 'a\nb' failed (data): it rains" in caplog.text


def test_a_client_counts_once_and_only_if_it_was_asked() -> None:
    intake, passed = accepted([result(0), result(0), result(9), result(1), result(2), result(3)])
    assert [one.client_id for one in passed] == [0, 1, 2, 3]
    assert [(failure.client_id, failure.stage) for failure in intake.failures] == [(0, "update"), (9, "update")]


def test_a_contribution_that_the_method_refuses_is_a_refused_update() -> None:
    def contribution(result: ClientResult) -> ClientResult:
        if result.client_id == 1:
            raise ValueError("out of\n range")
        return dataclasses.replace(result, payload={"x": torch.ones(1)})

    intake, passed = accepted([result(client) for client in range(4)], contribution=contribution)
    assert [list(one.payload) for one in passed] == [["x"]] * 3
    assert intake.failures == [ClientFailure(1, "update", "out of range")]


@pytest.mark.parametrize("error", [ZeroDivisionError("by no step"), OverflowError("by no step")])
def test_arithmetic_that_a_result_makes_impossible_is_a_refused_update(error: Exception) -> None:
    def contribution(result: ClientResult) -> ClientResult:
        if result.client_id == 1:
            raise error
        return result

    intake, passed = accepted([result(client) for client in range(4)], contribution=contribution)
    assert [one.client_id for one in passed] == [0, 2, 3]
    assert intake.failures == [ClientFailure(1, "update", "by no step")]
    assert intake.norms.keys() == {0, 2, 3}


def test_what_overflows_when_it_is_scaled_is_a_refused_update() -> None:
    def contribution(result: ClientResult) -> ClientResult:
        scale = 1e39 if result.client_id == 1 else 1.0
        return dataclasses.replace(result, payload={name: value * scale for name, value in result.payload.items()})

    intake, passed = accepted([result(client) for client in range(4)], contribution=contribution)
    assert [one.client_id for one in passed] == [0, 2, 3]
    assert intake.failures == [ClientFailure(1, "update", "what it contributes to model.w is NaN or infinite")]


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError, KeyboardInterrupt])
def test_errors_of_the_programs_own_are_no_failure_of_a_client(error: type[BaseException]) -> None:
    def fail(result: ClientResult) -> ClientResult:
        raise error("no space left")

    for contribution, on_client in ((fail, lambda told: None), (lambda result: result, fail)):
        intake = Intake(1, [ClientTask(0, 0)], EXPECTED, Method(), FederationConfig(1))  # type: ignore[arg-type]
        with pytest.raises(error, match="no space left"):
            list(intake.accept([result(0)], contribution, on_client))
        assert intake.failures == []


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (None, "the returned object is a NoneType, not a result"),
        ("a result", "the returned object is a str, not a result"),
        (ClientTask(2, 2), "the returned object is a ClientTask, not a result"),
        (result([2]), "the returned result does not name a client but [2]"),
        (result(True), "the returned result does not name a client but True"),
        (result(2.0), "the returned result does not name a client but 2.0"),
        (result(-2), "the returned result does not name a client but -2"),
        (result(10**5000), "the returned result does not name a client but <int>"),
        (result("2\x1b[2J\n"), r"the returned result does not name a client but '2\x1b[2J\n'"),
        (ClientFailure(None, "data", "rain"), "the returned result does not name a client but None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_nobodys_costs_the_client_of_which_nobody_heard(
    outcome: Any, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    intake, passed = accepted([result(0), result(1), outcome, result(3)])
    assert [one.client_id for one in passed] == [0, 1, 3]
    assert intake.failures == [ClientFailure(2, "lost", "nothing came back")]
    lost = "round 7: client 2 failed (lost): nothing came back"
    assert [record.getMessage() for record in caplog.records] == [f"round 7: {line}", lost]


def test_a_failure_counts_once_and_only_if_it_was_asked() -> None:
    failure = ClientFailure(0, "data", "rain")
    intake, _ = accepted(
        [failure, failure, result(1), ClientFailure(1, "data", "rain"), ClientFailure(9, "data", "rain")]
    )
    reason = "it was not asked for, or came twice"
    assert intake.failures[:4] == [failure, *(ClientFailure(client, "update", reason) for client in (0, 1, 9))]
    assert [one.client_id for one in intake.results] == [1]


def test_what_a_client_writes_is_one_line_without_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    name = "x\nround 9: \x1b[31mall is well\u202e"
    outcomes = [
        ClientFailure(0, "data", name),
        result(1, payload={**SOUND, name: torch.zeros(1)}),
        result(2, metrics={name: 1.0}),
        ClientFailure(3, name, "rain"),  # type: ignore[arg-type]
    ]
    with pytest.raises(RoundFailedError) as failed:
        accepted(outcomes)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all(line.isprintable() for line in [*lines, str(failed.value)])


def test_an_update_is_shortened_but_not_what_is_beside_the_model() -> None:
    _, passed = accepted([result(0)], clients=1, max_update_norm=2.5)
    assert passed[0].payload["model.w"].tolist() == [1.5, 2.0]
    assert passed[0].payload["control.w"].tolist() == [100.0, 100.0]
    assert passed[0].payload["model.n"] == 9
    _, passed = accepted([result(0)], clients=1, max_update_norm=5.0)
    assert passed[0].payload["model.w"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("options", "sound", "fails"),
    [
        ({}, 1, False),
        ({}, 0, True),  # one at least
        ({"min_success_fraction": 0.5}, 2, False),
        ({"min_success_fraction": 0.5}, 1, True),
        ({"min_success_fraction": 0.51}, 2, True),
        ({"min_success_fraction": 1.0}, 3, True),
        ({"aggregation": "median"}, 2, True),
        ({"aggregation": "median"}, 3, False),
    ],
)
def test_too_few_clients_fail_the_round(options: dict[str, Any], sound: int, fails: bool) -> None:
    outcomes = [result(client) for client in range(sound)]
    if not fails:
        accepted(outcomes, **options)
        return
    with pytest.raises(
        RoundFailedError, match=f"{sound} of 4 clients succeeded, . or more must; the last to fail: client 3"
    ):
        accepted(outcomes, **options)


def test_a_round_without_clients_fails() -> None:
    with pytest.raises(RoundFailedError, match="none of its clients holds examples"):
        accepted([], clients=0)


def test_tallies_are_added_up() -> None:
    data = tiny_data()
    module = make(FedAMM, data)
    one = {name: torch.ones_like(value) for name, value in module.tallies().items()}
    intake = Intake(1, [ClientTask(0, 0), ClientTask(1, 1)], EXPECTED, module, FederationConfig(1))
    intake.expected = dataclasses.replace(intake.expected, shared=SHARED, nonnegative=())
    outcomes = [result(0, tallies=one), result(1, tallies=one)]
    assert len(list(intake.accept(outcomes, lambda result: result, lambda result: None))) == 2
    assert {name: float(value.max()) for name, value in intake.tallies.items()} == dict.fromkeys(one, 2.0)


def test_tallies_that_were_not_asked_for_are_a_refused_update() -> None:
    intake, passed = accepted([result(0, tallies={"more": torch.ones(1)}), result(1), result(2), result(3)])
    assert [one.client_id for one in passed] == [1, 2, 3]
    assert intake.failures == [ClientFailure(0, "update", "it holds what was not asked for: more")]


# Outliers and metrics


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ({}, None),
        ({0: 1.0, 1: 1000.0}, None),
        ({0: 1.0, 1: 9.9, 2: 1.0}, None),
        ({0: 1.0, 1: 10.0, 2: 1.0}, (1, 10.0)),
        ({0: 0.0, 1: 10.0, 2: 0.0}, None),
        ({0: 2.0, 1: 60.0, 2: 1.0, 3: 3.0}, (1, 30.0)),
    ],
)
def test_an_update_much_longer_than_the_others_is_found(norms: dict[int, float], found: Any) -> None:
    assert outlier(norms) == found


@pytest.mark.parametrize(
    ("options", "warned"), [({}, True), ({"max_update_norm": 1e9}, False), ({"aggregation": "median"}, False)]
)
def test_an_outlier_is_reported_where_nothing_bounds_it(
    options: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**SOUND, "model.w": torch.tensor([300.0, 400.0])}
    accepted([result(0), result(1), result(2, payload=long), result(3)], **options)
    assert ("the update of client 2 is 100 times as long as the median of the others" in caplog.text) == warned


def test_client_metrics_are_weighted_by_examples() -> None:
    results = [
        ClientResult(0, 30, {}, {"loss": 1.0}, bytes_received=10, bytes_sent=4),
        ClientResult(1, 10, {}, {"loss": 3.0}, bytes_received=20, bytes_sent=8),
    ]
    assert client_metrics(results) == {
        "client/loss": 1.5,
        "client/loss_std": 0.75**0.5,  # (30 * 0.5 ** 2 + 10 * 1.5 ** 2) / 40
        "client/bytes_received": 15.0,
        "client/bytes_sent": 6.0,
    }
    assert client_metrics([]) == {}
    some = [ClientResult(0, 30, {}, {"loss": 1.0, "extra": 5.0}), ClientResult(1, 10, {}, {"loss": 1.0})]
    assert client_metrics(some)["client/extra"] == 5.0


def test_what_a_client_could_not_measure_is_left_out_and_counted() -> None:
    results = [
        ClientResult(0, 30, {}, {"loss": 1.0, "meta_loss": torch.nan}),
        ClientResult(1, 10, {}, {"loss": 3.0}),
        ClientResult(2, 1000, {}, {"loss": torch.nan}),
    ]
    metrics = client_metrics(results)
    assert (metrics["client/loss"], metrics["client/loss_std"]) == (1.5, 0.75**0.5)
    assert math.isnan(metrics["client/meta_loss"])  # nobody has measured it
    assert metrics["client/nan_metrics"] == 2
    assert math.isnan(client_metrics(results[2:])["client/loss_std"])


def test_metrics_at_their_bounds_overflow_nothing() -> None:
    results = [ClientResult(client, MAX_WHOLE, {}, {"loss": sign * MAX_METRIC}) for client, sign in ((0, 1), (1, -1))]
    metrics = client_metrics(results)
    assert metrics["client/loss"] == 0
    assert metrics["client/loss_std"] == pytest.approx(MAX_METRIC)


def test_a_run_records_so_many_numbers_about_clients_and_says_what_it_leaves_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    history: list[dict[str, float]] = [{"round": 0}]
    for round_num in range(1, 8):
        metrics = {"client/loss": 1.0, **{f"client/{round_num}_{number:03}": 1.0 for number in range(256)}}
        metrics = within_columns(metrics, history, round_num)
        assert metrics["client/loss"] == 1.0
        history.append({"round": round_num, **metrics})
    names = {name for row in history for name in row if name.startswith("client/")}
    assert len(names) == MAX_COLUMNS
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0].startswith("round 4: 1 metrics of clients are left out; a run records at most 1024: client/4_255")
    assert lines[1].startswith("round 5: 256 metrics of clients are left out")
    assert within_columns({"client/loss": 2.0}, history, 8) == {"client/loss": 2.0}
    assert within_columns({"client/4_000": 2.0}, history, 8) == {"client/4_000": 2.0}
