"""Where the wall time of a round goes."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Started when it is made; tells waiting for clients and evaluating from all the rest."""

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
        """Pass outcomes on; the time until the next one comes counts as ``clients``."""
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
            if hasattr(remaining, "close"):  # dropped half-way: cancel what is in flight
                remaining.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Return a context whose time counts as if it had not passed; to be entered while outcomes are waited for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._start += passed
            self._seconds["clients"] -= passed

    def paused_until(self, action: Callable[[], None]) -> Callable[[], None]:
        """Return the action with the time until it is called not counted."""
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
