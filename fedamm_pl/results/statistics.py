"""Statistics over the seeds of a method."""

from collections.abc import Sequence
from statistics import mean, stdev

LEAST_SEEDS = 3


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean of seeds, with their standard deviation if they are several.

    Example:
        >>> mean_and_deviation([60.0, 62.0]), mean_and_deviation([60.0])
        ('61.0 ± 1.4', '60.0')
    """
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def leader(groups: Sequence[Sequence[float]]) -> int | None:
    """Return which group's bar, mean ± standard deviation, lies above those of all others, or None.

    Three seeds or more of each group are needed: the spread of two says little.

    Example:
        >>> leader([[60.0, 61.0, 62.0], [70.0, 71.0, 72.0]]), leader([[60.0, 61.0, 62.0], [62.0, 63.0, 64.0]])
        (1, None)
    """
    if len(groups) < 2 or min(len(group) for group in groups) < LEAST_SEEDS:
        return None
    first = max(range(len(groups)), key=lambda index: mean(groups[index]))
    lower_end = mean(groups[first]) - stdev(groups[first])
    others = [mean(group) + stdev(group) for index, group in enumerate(groups) if index != first]
    return first if lower_end > max(others) else None
