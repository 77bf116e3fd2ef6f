"""A row of the benchmark table, and functions to compare the times of two functions."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """A row of the benchmark table."""

    what: str
    measured: float
    bar: float | None = None
    at_least: bool = False
    """Whether the bar is a lower bound."""
    unit: str = "x"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """``met`` or ``MISSED``; empty if there is no bar."""
        if self.bar is None:
            return ""
        return "met" if (self.measured >= self.bar if self.at_least else self.measured <= self.bar) else "MISSED"

    def cells(self) -> list[str]:
        """Return the cells of the row."""
        sign = "at least" if self.at_least else "at most"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}{self.unit}"
        return [self.what, f"{self.measured:.3g}{self.unit}", bar, self.verdict, self.note]


def pairs(what: str, first: Callable[[], float], second: Callable[[], float], repeats: int, **options: Any) -> Row:
    """Time two functions in turn, after one call of each that does not count; the row has the median ratio.

    Args:
        what: Description of the ratio.
        first: Runs once and returns its seconds.
        second: The same for the function to compare with; it is the denominator.
        repeats: Number of pairs to time.
        options: Fields of the row; ``names`` are the names of the two functions.
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
    """Return a function that calls another and returns the seconds, including those of the GPU."""

    def call() -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return call
