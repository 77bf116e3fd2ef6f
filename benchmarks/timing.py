"""A row of the table, and how to time two things against each other."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """A line of the table."""

    what: str
    measured: float
    bar: float | None = None
    at_least: bool = False
    """Whether the bar is a lower one."""
    unit: str = "x"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        if self.bar is None:
            return ""
        return "met" if (self.measured >= self.bar if self.at_least else self.measured <= self.bar) else "MISSED"

    def cells(self) -> list[str]:
        """What the table shows."""
        sign = "at least" if self.at_least else "at most"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}{self.unit}"
        return [self.what, f"{self.measured:.3g}{self.unit}", bar, self.verdict, self.note]


def pairs(what: str, first: Callable[[], float], second: Callable[[], float], repeats: int, **options: Any) -> Row:
    """Time two things in turn after a first go of each; the row is the median of first over second.

    Args:
        what: What the ratio is.
        first: Does it once and returns its seconds.
        second: The same for the yardstick.
        repeats: Pairs to time.
        options: Of the row; ``names`` are those of the two.
    """
    names = options.pop("names", ("first", "second"))
    first(), second()
    both = [(first(), second()) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in both)
    seconds = dict(
        zip(names, ([round(value, 4) for value in column] for column in zip(*both, strict=True)), strict=True)
    )
    medians = ", ".join(f"{name} {statistics.median(values):.3g} s" for name, values in seconds.items())
    return Row(what, ratio, seconds=seconds, **{"note": medians, **options})


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that calls another and returns its seconds, the GPU's included."""

    def call() -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return call
