"""What every executor keeps, wherever its clients train."""

import dataclasses
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedamm_pl import FedAMM, FederatedModule, Orchestrator
from fedamm_pl.algorithms import CReFF, Moon, Scaffold
from fedamm_pl.federation.executors import Executor, Outcome, Runner, RunSpec, Sequential
from fedamm_pl.federation.store import FileStore
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.seeding import derive_seed
from tests.federation.executors import methods
from tests.federation.executors.methods import BROKEN_SEED, NUM_CLIENTS, STRUCK, UNREADABLE
from tests.federation.small import assert_equal, federation
from tests.tiny import tiny_data

READABLE = [client for client in range(NUM_CLIENTS) if client != UNREADABLE]
# asynchronous FedAMM is what the scripted method is
BITS: list[tuple[type[FederatedModule], dict[str, Any]]] = [
    (FedAMM, {"meta_update": "synchronous", "meta_interval": 2}),
    (Scaffold, {}),
    (Moon, {}),
    (CReFF, {"model": "tests.federation.executors.methods.dropout", "match_steps": 3, "retrain_steps": 3}),
]


def broadcast(scripted: RunSpec, round_num: int) -> Broadcast:
    return Broadcast(round_num, 1, scripted.module.shared_state())


def tasks(round_num: int, clients: Sequence[int] = READABLE) -> list[ClientTask]:
    return [ClientTask(client, derive_seed(0, "client", round_num, client)) for client in clients]


def at_first(client: int) -> State:
    """What a client has before its first round: its personal state."""
    return {"own.visits": torch.tensor(10)}


def comparable(outcome: Outcome) -> dict[str, Any]:
    """All of a result but its times; tensors as lists, so that equal means equal bits."""
    assert isinstance(outcome, ClientResult), outcome
    plain = dataclasses.asdict(dataclasses.replace(outcome, train_seconds=0, meta_seconds=0))
    for part in ("payload", "kept", "tallies"):
        plain[part] = {name: (value.dtype, value.tolist()) for name, value in getattr(outcome, part).items()}
    return plain


class ExecutorContract:
    """Run it for an executor by a subclass that says how to make one."""

    window: ClassVar[int]
    """How many tasks may be given out beyond the one yielded last."""
    method: ClassVar[type[FederatedModule]] = methods.Scripted
    """The method whose rounds go as their numbers say."""
    bits: ClassVar[list[tuple[type[FederatedModule], dict[str, Any]]]] = BITS
    """Methods whose runs are compared."""

    def executor(self) -> Executor:
        raise NotImplementedError

    def compare(self, found: Iterable[Outcome], expected: Iterable[Outcome]) -> None:
        """Check that results are the same, bit for bit."""
        assert [comparable(outcome) for outcome in found] == [comparable(outcome) for outcome in expected]

    def compare_runs(self, found: Orchestrator, expected: Orchestrator) -> None:
        """Check that runs have the same history and state, bit for bit."""
        assert found.state.history == expected.state.history
        assert_equal(found.state.shared, expected.state.shared)
        assert found.state.kept == expected.state.kept

    def compare_states(self, found: State, expected: State) -> None:
        """Check that what clients keep is the same, bit for bit."""
        assert_equal(found, expected)

    # What comes out

    def test_outcomes_come_in_the_order_of_the_tasks_and_one_a_task(self, runner: Runner, scripted: RunSpec) -> None:
        for clients in (READABLE, READABLE[::-1], [5, 0, 3], [2], []):
            outcomes = runner.run(broadcast(scripted, methods.SLOW), tasks(methods.SLOW, clients), at_first)
            assert [outcome.client_id for outcome in outcomes] == list(clients)

    def test_a_bounded_number_of_clients_is_given_out_beyond_what_was_taken(
        self, runner: Runner, scripted: RunSpec
    ) -> None:
        given: list[int] = []

        def kept(client: int) -> State:
            given.append(client)
            return at_first(client)

        # the first client is slow: what the others return waits for it
        outcomes = runner.run(broadcast(scripted, methods.SLOW), tasks(methods.SLOW), kept)
        assert given == []  # nobody trains until a result is asked for
        for taken, outcome in enumerate(outcomes, 1):
            assert isinstance(outcome, ClientResult)
            assert taken <= len(given) <= taken - 1 + self.window
        assert given == READABLE

    def test_results_are_those_of_one_after_the_other(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        for round_num, clients in ((methods.SOUND, READABLE), (methods.SLOW, READABLE[::-1])):
            sent, asked = broadcast(scripted, round_num), tasks(round_num, clients)
            self.compare(runner.run(sent, asked, at_first), reference.run(sent, asked, at_first))

    def test_results_are_detached_and_name_what_was_trained(self, runner: Runner, scripted: RunSpec) -> None:
        (result,) = runner.run(broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [2]), at_first)
        assert isinstance(result, ClientResult)
        assert set(result.payload) == set(scripted.module.shared_state())
        assert not any(value.requires_grad for value in result.payload.values())
        assert set(result.metrics) == {"loss", "meta_loss"}
        assert result.num_examples == scripted.data.client_size(2)
        assert result.train_seconds > 0
        assert result.meta_seconds > 0

    # What goes wrong

    @pytest.mark.parametrize(
        ("round_num", "stage", "reason"),
        [
            (methods.FAILS_IN_SURVEY, "training", "RuntimeError: no survey (methods.py, line "),
            (methods.FAILS_IN_QUESTION, "meta step", "RuntimeError: no question (methods.py, line "),
            (methods.FAILS_IN_TRAINING, "training", "RuntimeError: no step (methods.py, line "),
            (methods.FAILS_IN_PAYLOAD, "training", "RuntimeError: no payload (methods.py, line "),
        ],
    )
    def test_a_client_that_fails_costs_its_own_result(
        self, round_num: int, stage: str, reason: str, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        asked = tasks(round_num, [0, STRUCK, 2, 3])
        found = list(runner.run(broadcast(scripted, round_num), asked, at_first))
        failure = found.pop(1)
        assert isinstance(failure, ClientFailure)
        assert (failure.client_id, failure.stage) == (STRUCK, stage)
        assert failure.reason.startswith(reason)
        del asked[1]
        self.compare(found, reference.run(broadcast(scripted, round_num), asked, at_first))

    def test_data_that_cannot_be_read_cost_one_client(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        sent, asked = broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [0, UNREADABLE, 2, 3, 4])
        asked[3] = ClientTask(3, BROKEN_SEED)
        zero, first, two, second, four = runner.run(sent, asked, at_first)
        for outcome, client, reason in ((first, UNREADABLE, "unreadable"), (second, 3, "no second batch")):
            assert isinstance(outcome, ClientFailure)
            assert (outcome.client_id, outcome.stage) == (client, "data")
            assert outcome.reason.startswith(f"OSError: {reason} (methods.py, line ")
        self.compare((zero, two, four), reference.run(sent, [asked[0], asked[2], asked[4]], at_first))

    # What clients keep

    def test_what_a_client_keeps_arrives_and_comes_back(self, runner: Runner, scripted: RunSpec) -> None:
        kept: dict[int, State] = {}
        for round_num, clients in ((1, [0, 1, 2]), (11, [0, 2]), (12, [2, 3])):
            asked = tasks(round_num, clients)
            for result in runner.run(
                broadcast(scripted, round_num), asked, lambda client: kept.get(client, at_first(client))
            ):
                assert isinstance(result, ClientResult)
                assert "own.visits" not in result.payload
                kept[result.client_id] = result.kept
        assert {client: int(state["rounds"]) for client, state in kept.items()} == {0: 2, 1: 1, 2: 3, 3: 1}

    def test_personal_state_is_part_of_what_a_client_keeps(self, runner: Runner, scripted: RunSpec) -> None:
        own = {0: {"own.visits": torch.tensor(100)}, 1: {"own.visits": torch.tensor(10)}}
        results = runner.run(
            broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [0, 1]), lambda client: own[client]
        )
        assert [int(result.kept["own.visits"]) for result in results if isinstance(result, ClientResult)] == [101, 11]

    # Several rounds, and the end

    def test_a_round_that_is_dropped_half_way_leaves_nothing_to_the_next(
        self, runner: Runner, reference: Runner, scripted: RunSpec
    ) -> None:
        dropped = runner.run(broadcast(scripted, methods.SLOW), tasks(methods.SLOW, [5, 0, 2, 3]), at_first)
        next(dropped)
        dropped.close()  # type: ignore[attr-defined]
        sent, asked = broadcast(scripted, methods.SOUND), tasks(methods.SOUND, [2, 4])
        self.compare(runner.run(sent, asked, at_first), reference.run(sent, asked, at_first))

    def test_it_says_what_clients_compute_with(self, runner: Runner, scripted: RunSpec) -> None:
        assert runner.environment["content_hash"] == scripted.data.content_hash
        assert runner.environment["threads"] == 1
        assert runner.environment["device"] == "cpu"
        assert runner.environment["torch"] == torch.__version__.partition("+")[0]

    def test_a_run_is_that_of_one_client_after_the_other(
        self, algorithm: type[FederatedModule], options: dict[str, Any], tmp_path: Path
    ) -> None:
        before = set(multiprocessing.active_children())
        more: dict[str, Any] = {"num_rounds": 3, "client_fraction": 0.75, "eval_interval": 3}
        plain, other = (
            federation(algorithm, tiny_data(), options, executor=executor, output_dir=tmp_path / name, **more)
            for name, executor in (("plain", Sequential()), ("other", self.executor()))
        )
        for run in (plain, other):
            run.run()
        self.compare_runs(other, plain)
        assert other.state.counts["failed_clients"] == 0
        files = sorted(path.name for path in (tmp_path / "plain/clients").glob("*"))
        assert bool(files) == (algorithm in (Scaffold, Moon) or bool(algorithm.personal))
        for name in files:
            version = [int(number) for number in name.removesuffix(".state").split("_")]
            self.compare_states(
                *(FileStore(tmp_path / folder / "clients").read(*version) for folder in ("other", "plain"))
            )
        assert min(other.state.seconds.values()) >= 0
        assert other.state.client_seconds["train"] > 0
        assert set(multiprocessing.active_children()) == before
