"""A round's evaluation while the clients of the next one train already: the same bits, the same order, and a clean end."""

import time
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import CCVR, CReFF, FedRoD, Moon, Scaffold
from fedamm_pl.federation.callbacks import FederationCallback, Progress
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.stopwatch import Stopwatch
from tests.federation.small import Recorder, assert_equal, federation
from tests.tiny import tiny_data

METHODS: list[tuple[type[FederatedModule], dict[str, Any]]] = [
    (FedAvg, {}),
    (FedAMM, {}),
    (FedAMM, {"meta_update": "synchronous"}),
    (Scaffold, {}),
    (Moon, {}),
    (FedRoD, {}),
    (CReFF, {"match_steps": 3, "retrain_steps": 3}),
    (CCVR, {}),
]


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all evaluations come after the next round has begun, but for those of methods that calibrate."""
    monkeypatch.setattr(Orchestrator, "_may_overlap", lambda run, runner: not run.server.module.calibrates(False))


def files(folder: Path) -> dict[str, bytes]:
    """What a run has written that does not tell times."""
    names = ("metrics.csv", "clients/*")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in sorted(folder.glob(name))}


@pytest.mark.parametrize(
    ("algorithm", "options"), METHODS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__
)
@pytest.mark.parametrize("eval_interval", [1, 2])
def test_the_run_is_the_same(
    algorithm: type[FederatedModule],
    options: dict[str, Any],
    eval_interval: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, watches = [], [Recorder(), Recorder()]
    for watch, overlap in zip(watches, (False, True), strict=True):
        if overlap:
            monkeypatch.setattr(
                Orchestrator, "_may_overlap", lambda run, runner: not run.server.module.calibrates(False)
            )
        more: dict[str, Any] = {"num_rounds": 5, "eval_interval": eval_interval, "client_fraction": 0.5}
        data = tiny_data(local_test_fraction=0.25)
        folder = tmp_path / str(overlap)
        runs.append(federation(algorithm, data, options, output_dir=folder, callbacks=[watch], **more))
        runs[-1].run()
    plain, other = runs
    assert other.state.history == plain.state.history
    assert_equal(other.state.shared, plain.state.shared)
    assert_equal(other.module.state_dict(), plain.module.state_dict())
    assert other.state.kept == plain.state.kept
    assert other.state.client_accuracies == plain.state.client_accuracies
    assert watches[1].calls == watches[0].calls
    assert files(tmp_path / "True") == files(tmp_path / "False")
    assert other.state.bytes_total == plain.state.bytes_total


class Stop(FederationCallback):
    """Ends a run well after a round."""

    def __init__(self, round_num: int) -> None:
        self.round_num = round_num

    def on_round_end(self, run: Run, record: Any) -> None:
        if record.round_num == self.round_num:
            run.stop("enough")


@pytest.mark.parametrize("eval_interval", [1, 5])
def test_a_callback_that_ends_the_run_drops_the_round_that_has_begun(
    eval_interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"num_rounds": 9, "eval_interval": eval_interval}
    plain = federation(Scaffold, callbacks=[Stop(3)], **more)
    plain.run()
    monkeypatch.setattr(Orchestrator, "_may_overlap", lambda run, runner: True)
    other = federation(Scaffold, callbacks=[Stop(3)], output_dir=tmp_path, **more)
    other.run()
    assert (other.state.round_num, other.state.ended) == (3, "enough")
    assert other.state.history == plain.state.history
    assert_equal(other.state.shared, plain.state.shared)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 1 + len(plain.state.history)


def test_early_stopping_ends_the_run_where_it_would_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> Orchestrator:
        run = federation(data=tiny_data(num_val_per_class=2), method={"lr": 0.3}, num_rounds=40, early_stopping=2)
        run.run()
        return run

    plain = stopped()
    monkeypatch.setattr(Orchestrator, "_may_overlap", lambda run, runner: True)
    other = stopped()
    assert 3 <= plain.state.round_num < 40
    assert other.state.ended == plain.state.ended
    assert other.state.history == plain.state.history
    assert_equal(other.state.shared, plain.state.shared)


class Fail(FederationCallback):
    """Raises at the end of a round, once."""

    failed = False

    def on_round_end(self, run: Run, record: Any) -> None:
        if record.round_num == 3 and not Fail.failed:
            Fail.failed = True
            raise KeyboardInterrupt


@pytest.mark.usefixtures("overlapping")
def test_an_interruption_between_two_rounds_costs_no_more_than_the_round(tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_rounds": 5, "eval_interval": 2}
    whole = federation(Scaffold, **more)
    whole.run()
    broken = federation(Scaffold, output_dir=tmp_path, callbacks=[Fail()], **more)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert broken.state.round_num == 2  # as what is on the disk
    resumed = federation(Scaffold, output_dir=tmp_path, callbacks=[Fail()], **more)
    assert resumed.run() == whole.state.history
    assert_equal(resumed.state.shared, whole.state.shared)
    assert broken.run() == whole.state.history  # and the same run goes on


@pytest.mark.usefixtures("overlapping")
def test_seconds_add_up_to_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = federation(num_rounds=4, callbacks=[Progress()])
    evaluate = slow.evaluator.evaluate

    def slowly(*args: Any) -> dict[str, float]:
        time.sleep(0.1)
        return evaluate(*args)

    monkeypatch.setattr(slow.evaluator, "evaluate", slowly)
    with slow.opened():
        start = time.perf_counter()
        slow.run()
        passed = time.perf_counter() - start
    seconds = slow.state.seconds
    assert seconds["evaluate"] >= 0.4
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) <= passed  # nothing is counted twice


def test_a_stopwatch_leaves_out_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fedamm_pl.federation.stopwatch.time.perf_counter", lambda: now[0])

    def later(seconds: float) -> None:
        now[0] += seconds

    first, second = Stopwatch(), Stopwatch()
    close = first.paused_until(lambda: later(2.0))
    later(5.0)  # the next round is given out

    def outcomes() -> Any:
        with second.aside():
            close()
        later(3.0)
        yield 1

    assert list(second.waiting_for(outcomes())) == [1]
    assert first.stop() == {"clients": 0.0, "evaluate": 0.0, "other": 2.0 + 3.0}
    assert second.stop() == {"clients": 3.0, "evaluate": 0.0, "other": 5.0}


def test_evaluations_wait_where_clients_train_on_the_servers_own_device() -> None:
    run = federation()
    with run.opened():
        assert run._opened is not None
        runner = run._opened[1]
        assert not run._may_overlap(runner)  # in this process
        for busy, workers_here, expected in (((0, 2), 2, False), ((0, 2), 0, True), ((0, 0), 0, False)):
            fake: Any = type("Fake", (), {"busy": busy})()
            run.executor = type("Fake", (), {"workers_here": workers_here})()  # type: ignore[assignment]
            assert run._may_overlap(fake) == expected
