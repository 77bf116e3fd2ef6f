"""The end of a round: when it is evaluated, and what it is said to have cost."""

from typing import Any

import pytest

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.federation.orchestrator import FederationError
from tests.federation.executors.methods import HalfReadable
from tests.federation.small import Recorder, federation


def test_wall_time_and_the_time_of_clients_are_two_figures() -> None:
    recorder = Recorder()
    run = federation(FedAMM, callbacks=[recorder])
    run.run()
    for record in recorder.records:
        assert set(record.seconds) == {"clients", "evaluate", "other"}
        assert set(record.client_seconds) == {"train", "meta"}
        assert min(record.seconds.values()) >= 0
    for record in recorder.records[1:]:  # one after the other: waiting for them is their time, and little else
        assert record.client_seconds["train"] == pytest.approx(sum(r.train_seconds for r in record.results))
        assert record.client_seconds["meta"] == pytest.approx(sum(r.meta_seconds for r in record.results))
        assert sum(record.client_seconds.values()) <= record.seconds["clients"]
    for kinds, name in ((run.state.seconds, "seconds"), (run.state.client_seconds, "client_seconds")):
        for kind, value in kinds.items():  # of the rounds: what round 0 has cost is no part of it
            assert value == pytest.approx(sum(getattr(record, name)[kind] for record in recorder.records[1:]))


@pytest.mark.parametrize(("eval_interval", "evaluated"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (9, [0, 3])])
def test_every_so_many_rounds_and_the_first_and_the_last_are_evaluated(
    eval_interval: int, evaluated: list[int]
) -> None:
    recorder = Recorder()
    history = federation(num_rounds=3, eval_interval=eval_interval, callbacks=[recorder]).run()
    assert [row["round"] for row in history] == evaluated
    assert [record.round_num for record in recorder.records if record.evaluated] == evaluated
    for record in recorder.records:
        assert ("test/acc" in record.metrics) == record.evaluated
        assert ("client/loss" in record.metrics) == (record.round_num > 0)
        assert (record.seconds["evaluate"] > 0) == record.evaluated


def test_a_round_that_stops_the_run_is_evaluated_and_shows_no_tallies() -> None:
    recorder = Recorder()
    data = HalfReadable("tiny", num_clients=8, num_meta_per_class=2, imbalance_factor=0.2, partition="iid")
    options: dict[str, Any] = {"client_fraction": 1.0, "min_success_fraction": 1.0, "max_failed_rounds": 2}
    run = federation(FedAMM, data, num_rounds=9, eval_interval=9, callbacks=[recorder], **options)
    with pytest.raises(FederationError):
        run.run()
    assert [row["round"] for row in run.state.history] == [0, 2]
    assert run.state.history[1]["test/acc"] == run.state.history[0]["test/acc"]
    assert "weight_per_class" not in run.state.diagnostics[-1]
    assert recorder.calls[-1] == "run_end"
    assert [record.failed for record in recorder.records[1:]] == [
        "7 of 8 clients succeeded, 8 or more must; the last to fail: client 6 failed (data): "
        + recorder.records[1].failures[0].reason
    ] * 2


def test_a_clean_run_counts_nothing() -> None:
    run = federation(FedAvg)
    run.run()
    assert run.state.counts == dict.fromkeys(("failed_clients", "refused_updates", "failed_rounds", "resumes"), 0)
