"""``Stopwatch``: measures what the wall time of a round is spent on."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Measures wall time from its creation on: waiting for clients, evaluating, and everything else."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds = {"clients": 0.0, "evaluate": 0.0}

    @contextmanager
    def _during(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - start

    def waiting_for(self, outcomes: Iterable[T]) -> Iterator[T]:
        """Yield the outcomes; the time spent waiting for the next one counts as ``clients``."""
        remaining = iter(outcomes)
        try:
            while True:
                with self._during("clients"):
                    try:
                        outcome = next(remaining)
                    except StopIteration:
                        return
                yield outcome
        finally:
            if hasattr(remaining, "close"):  # closed early: cancel the clients that still train
                remaining.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Return a context whose time is not counted; it must be entered while waiting for outcomes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._start += passed
            self._seconds["clients"] -= passed

    def paused_until(self, action: Callable[[], None]) -> Callable[[], None]:
        """Return a function that calls the action; the time until it is called is not counted."""
        start = time.perf_counter()

        def call() -> None:
            self._start += time.perf_counter() - start
            action()

        return call

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context whose time counts as ``evaluate``."""
        return self._during("evaluate")

    def stop(self) -> dict[str, float]:
        """Return the seconds so far by kind: clients, evaluate, other."""
        other = time.perf_counter() - self._start - sum(self._seconds.values())
        return {**self._seconds, "other": other}
