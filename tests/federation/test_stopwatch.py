from collections.abc import Iterator

import pytest

from fedamm_pl.federation import stopwatch as module
from fedamm_pl.federation.stopwatch import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_each_second_of_a_round_goes_to_one_kind(clock: Clock) -> None:
    def outcomes() -> Iterator[int]:
        for value in (1, 2):
            clock.now += 10
            yield value
        clock.now += 1  # the end of the last client

    watch = Stopwatch()
    clock.now += 0.5
    seen = []
    for value in watch.waiting_for(outcomes()):
        clock.now += 3  # the server reduces
        seen.append(value)
    with watch.evaluating():
        clock.now += 7
    clock.now += 0.25
    assert seen == [1, 2]
    assert watch.stop() == {"clients": 21.0, "evaluate": 7.0, "other": 6.75}


def test_an_evaluation_that_fails_has_taken_its_time(clock: Clock) -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.evaluating():  # noqa: PT012
        clock.now += 2
        raise KeyError
    assert watch.stop() == {"clients": 0.0, "evaluate": 2.0, "other": 0.0}


def test_what_is_dropped_half_way_is_closed() -> None:
    closed: list[bool] = []

    def outcomes() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    waiting = Stopwatch().waiting_for(outcomes())
    next(waiting)
    waiting.close()  # type: ignore[attr-defined]
    assert closed == [True]


def test_an_error_passes() -> None:
    def outcomes() -> Iterator[int]:
        yield 1
        raise OSError("workers")

    with pytest.raises(OSError, match="workers"):
        list(Stopwatch().waiting_for(outcomes()))


def test_any_iterable_will_do() -> None:
    assert list(Stopwatch().waiting_for([1, 2])) == [1, 2]
