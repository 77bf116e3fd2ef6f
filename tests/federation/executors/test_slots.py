"""The loop of executors with several workers, alone: workers of a made-up world, whose time passes when it is waited for."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamm_pl.federation.executors import slots as module
from fedamm_pl.federation.executors.base import Outcome
from fedamm_pl.federation.executors.slots import WorkerLostError, run_on_slots
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State

REPEATABLE = settings(deadline=None, derandomize=True, database=None, max_examples=300)
ROUND = Broadcast(1, 1, {})
NEVER = float("inf")
Fate = tuple[float, Literal["done", "dies", "hangs"]]
"""Seconds that an attempt at a client takes, and what comes of it."""


@dataclass
class World:
    """What workers do, and what was seen of it.

    Attributes:
        fate: Client and number of the attempt -> what happens.
        start: Number of the start -> seconds until the worker is ready, and whether it is at all.
        sent: What was given to workers, in order.
    """

    fate: Callable[[int, int], Fate] = lambda client, attempt: (1.0, "done")
    start: Callable[[int], tuple[float, bool]] = lambda number: (1.0, True)
    now: float = 0.0
    starts: int = 0
    sent: list[ClientTask] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def wait(self, waited: Sequence[Any], seconds: float | None) -> list[Any]:
        due = min([worker.due for worker in waited], default=NEVER)
        limit = NEVER if seconds is None else self.now + seconds
        assert min(due, limit) < NEVER, "it waits for ever"
        self.now = max(self.now, min(due, limit))
        return [worker for worker in waited if worker.due <= self.now]


class Worker:
    """A slot of this world; its first worker is ready."""

    def __init__(self, world: World) -> None:
        self.world, self.ready, self.due = world, True, NEVER
        self.task: ClientTask | None = None
        self.dead = self.starting = False

    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        assert broadcast is ROUND
        assert self.ready
        if self.dead:
            raise EOFError("it died idle")
        attempt = sum(other.client_id == task.client_id for other in self.world.sent)
        self.world.sent.append(task)
        seconds, self.end = self.world.fate(task.client_id, attempt)
        self.ready, self.task = False, task
        self.due = NEVER if self.end == "hangs" else self.world.now + seconds

    def receive(self) -> Outcome | None:
        assert self.due <= self.world.now
        if self.starting:
            if self.dead:
                raise EOFError("it did not start")
            self.starting, self.ready, self.due = False, True, NEVER
            return None
        if self.end == "dies":
            raise EOFError("SIGKILL")
        assert self.task is not None
        self.ready, self.due = True, NEVER
        return ClientResult(self.task.client_id, 1, {})

    def restart(self) -> None:
        seconds, sound = self.world.start(self.world.starts)
        self.world.starts += 1
        self.ready, self.starting, self.dead, self.task = False, True, not sound, None
        self.due = self.world.now + seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "time", world)
    return world


def clients(outcomes: Iterator[Outcome]) -> list[Any]:
    """The clients; of those that are lost the reasons."""
    return [str(one) if isinstance(one, ClientFailure) else one.client_id for one in outcomes]


def run(world: World, num_clients: int, num_slots: int = 2, **options: Any) -> Iterator[Outcome]:
    tasks = [ClientTask(client, 100 + client) for client in range(num_clients)]
    workers = options.pop("workers", None) or [Worker(world) for _ in range(num_slots)]
    return run_on_slots(workers, world.wait, ROUND, tasks, lambda client: {}, **options)


def test_order_is_that_of_the_tasks_whatever_finishes_first(world: World) -> None:
    world.fate = lambda client, attempt: (10.0 - client, "done")
    assert clients(run(world, 8, 3)) == list(range(8))


@pytest.mark.parametrize("num_clients", [0, 1, 8])
def test_what_is_to_be_done_meanwhile_is_done_once_when_all_workers_have_a_client(
    num_clients: int, world: World
) -> None:
    sent: list[int] = []
    assert clients(run(world, num_clients, 2, meanwhile=lambda: sent.append(len(world.sent)))) == list(
        range(num_clients)
    )
    assert sent == [min(num_clients, 2)]


def test_what_is_raised_meanwhile_ends_the_round_and_stops_who_has_begun(world: World) -> None:
    def meanwhile() -> None:
        raise KeyError("over")

    with pytest.raises(KeyError, match="over"):
        clients(run(world, 8, 2, meanwhile=meanwhile))
    assert (len(world.sent), world.starts) == (2, 2)


def test_a_client_whose_result_has_come_while_the_server_was_busy_is_not_out_of_time(world: World) -> None:
    def meanwhile() -> None:
        world.now += 100.0

    assert clients(run(world, 4, 2, timeout=5.0, meanwhile=meanwhile)) == [0, 1, 2, 3]


def test_the_longest_of_those_that_may_be_given_out_is_next(world: World) -> None:
    lengths = [1, 2, 9, 3, 3, 8, 5, 1]
    world.fate = lambda client, attempt: (lengths[client], "done")
    found = clients(run(world, 8, 1, size=lambda task: lengths[task.client_id]))
    assert found == list(range(8))
    assert [task.client_id for task in world.sent] == [
        1,
        0,
        2,
        3,
        5,
        4,
        6,
        7,
    ]  # of two at a time, as the first is awaited


def test_longest_first_ends_sooner_than_in_order(world: World) -> None:
    lengths = [1.0, 1.0, 1.0, 4.0]  # in order, the longest would train alone at the end
    world.fate = lambda client, attempt: (lengths[client], "done")
    assert clients(run(world, 4, 2, size=lambda task: int(lengths[task.client_id]))) == [0, 1, 2, 3]
    assert world.now == 4.0


def test_no_task_gives_no_outcome(world: World) -> None:
    assert clients(run(world, 0)) == []


def test_as_many_train_at_once_as_there_are_workers(world: World) -> None:
    assert clients(run(world, 8, 4)) == list(range(8))
    assert world.now == 2.0  # two times a second, not eight


def test_a_slow_client_holds_back_a_bounded_number_of_others(world: World) -> None:
    world.fate = lambda client, attempt: (100.0 if client == 0 else 1.0, "done")
    outcomes = run(world, 20, 2)
    next(outcomes)
    assert [task.client_id for task in world.sent] == [0, 1, 2, 3]  # twice the number of workers
    assert clients(outcomes) == list(range(1, 20))


def test_nothing_is_given_out_before_an_outcome_is_asked_for(world: World) -> None:
    outcomes = run(world, 3)
    assert world.sent == []
    next(outcomes)
    assert len(world.sent) == 2


def test_a_client_whose_worker_died_is_trained_again_with_the_same_seed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if (client, attempt) == (1, 0) else "done")
    assert clients(run(world, 4)) == [0, 1, 2, 3]
    assert [task.seed for task in world.sent if task.client_id == 1] == [101, 101]
    assert world.starts == 1
    assert "round 1: client 1 is trained again: SIGKILL" in caplog.text
    world.sent.clear()
    list(run(world, 2, names=["north", "south"]))
    assert "round 1: client 'south' is trained again: SIGKILL" in caplog.text


@pytest.mark.parametrize(("max_retries", "times"), [(0, ""), (1, " (2 times)"), (3, " (4 times)")])
def test_a_client_that_kills_its_worker_each_time_is_lost(max_retries: int, times: str, world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if client == 1 else "done")
    found = clients(run(world, 4, max_retries=max_retries))
    assert found == [0, f"client 1 failed (lost): SIGKILL{times}", 2, 3]
    assert world.starts == max_retries + 1
    assert len(world.sent) == 4 + max_retries  # no other client was trained twice


def test_a_client_out_of_time_is_lost_and_its_worker_replaced(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "hangs" if client == 0 else "done")
    found = clients(run(world, 4, timeout=2.5, max_retries=1))
    assert found == ["client 0 failed (lost): nothing came back within 2.5 s (2 times)", 1, 2, 3]
    assert world.starts == 2


def test_time_that_a_worker_takes_to_start_does_not_count(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if (client, attempt) == (0, 0) else "done")
    world.start = lambda number: (50.0, True)
    assert clients(run(world, 2, 1, timeout=2.0)) == [0, 1]


def test_a_client_just_within_its_time_is_not_lost(world: World) -> None:
    world.fate = lambda client, attempt: (1.999, "done")
    assert clients(run(world, 6, 2, timeout=2.0)) == list(range(6))
    assert world.starts == 0


def test_a_worker_that_died_idle_is_replaced(world: World) -> None:
    workers = [Worker(world), Worker(world)]
    workers[0].dead = True
    assert clients(run(world, 4, workers=workers, max_retries=0)) == [0, 1, 2, 3]  # no fault of the client's


def test_three_failed_starts_in_a_row_end_the_run(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if client == 0 else "done")
    world.start = lambda number: (1.0, False)
    with pytest.raises(WorkerLostError, match="3 workers in a row died before they trained a client: it did not start"):
        clients(run(world, 2, 1))
    assert world.starts == 4  # that of the client, and three that failed


def test_a_worker_that_hangs_while_it_starts_is_replaced(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if (client, attempt) == (0, 0) else "done")
    world.start = lambda number: (NEVER if number == 0 else 2.0, True)
    assert clients(run(world, 3, 1, start_timeout=600.0)) == [0, 1, 2]
    assert world.starts == 2
    assert 600.0 < world.now < 610.0


def test_workers_that_all_hang_while_they_start_end_the_run(world: World) -> None:
    workers = [Worker(world)]
    workers[0].ready, workers[0].starting = False, True  # since the round before
    world.start = lambda number: (NEVER, True)
    with pytest.raises(WorkerLostError, match=r"3 workers in a row .* a client: its worker did not start within 600 s"):
        clients(run(world, 1, workers=workers, start_timeout=600.0))
    assert world.now == 1800.0


def test_a_worker_that_hangs_while_it_starts_keeps_nobody_waiting(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if (client, attempt) == (0, 0) else "done")
    world.start = lambda number: (NEVER, True)
    assert clients(run(world, 4, 2, start_timeout=600.0)) == [0, 1, 2, 3]
    assert world.now < 10.0


def test_two_failed_starts_in_a_row_do_not(world: World) -> None:
    world.fate = lambda client, attempt: (1.0, "dies" if attempt == 0 else "done")
    world.start = lambda number: (1.0, number % 3 == 2)
    assert clients(run(world, 4, 1)) == [0, 1, 2, 3]


def test_what_is_dropped_half_way_is_cancelled_and_the_workers_go_on(world: World) -> None:
    world.fate = lambda client, attempt: (1.0 if client == 0 else 50.0, "done")
    workers = [Worker(world) for _ in range(3)]
    outcomes = run(world, 6, workers=workers)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert [worker.starting for worker in workers] == [False, True, True]
    world.fate = lambda client, attempt: (1.0, "done")
    assert clients(run(world, 6, workers=workers)) == list(range(6))


def test_an_error_of_who_asks_what_was_kept_cancels_too(world: World) -> None:
    def kept(client: int) -> State:
        if client == 1:
            raise OSError("the disk")
        return {}

    workers = [Worker(world) for _ in range(2)]
    with pytest.raises(OSError, match="the disk"):
        list(run_on_slots(workers, world.wait, ROUND, [ClientTask(0, 0), ClientTask(1, 1)], kept))
    assert workers[0].starting


FATES = st.tuples(st.sampled_from([0.0, 1.0, 1.5, 4.0]), st.sampled_from(["done", "done", "dies", "hangs"]))


@given(
    num_slots=st.integers(1, 4),
    fates=st.lists(st.lists(FATES, min_size=4, max_size=4), max_size=12),
    starts=st.lists(st.sampled_from([0.0, 1.0, 9.0]), min_size=1, max_size=5),
    max_retries=st.integers(0, 3),
    takes=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
@REPEATABLE
def test_any_order_of_ends_and_deaths_gives_each_task_its_outcome(
    num_slots: int, fates: list[list[Fate]], starts: list[float], max_retries: int, takes: list[int]
) -> None:
    pause = itertools.cycle(takes)
    delays = itertools.cycle(starts)
    world = World(lambda client, attempt: fates[client][attempt], lambda number: (next(delays), True))
    given: list[int] = []

    def kept(client: int) -> State:
        given.append(client)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", world)
        patch.setattr(module.log, "disabled", True)
        workers = [Worker(world) for _ in range(num_slots)]
        tasks = [ClientTask(client, client) for client in range(len(fates))]
        outcomes = run_on_slots(
            workers, world.wait, ROUND, tasks, kept, timeout=5.0, start_timeout=10.0, max_retries=max_retries
        )
        found = []
        for taken, outcome in enumerate(outcomes, 1):
            found.append(outcome)
            assert len(set(given)) <= taken - 1 + 2 * num_slots
            assert max(given) < taken - 1 + 2 * num_slots
            world.now += next(pause)  # who takes the outcomes has other things to do: no client shall be lost by that
    assert [outcome.client_id for outcome in found] == list(range(len(fates)))
    for client, outcome in enumerate(found):
        tried = fates[client][: max_retries + 1]
        sound = [end == "done" for _, end in tried]
        assert isinstance(outcome, ClientResult) == any(sound)
        assert given.count(client) == (sound.index(True) + 1 if any(sound) else max_retries + 1)
