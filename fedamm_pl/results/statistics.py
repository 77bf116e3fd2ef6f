"""Statistics over the seeds of a method."""

from collections.abc import Sequence
from statistics import mean, stdev


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean of seeds, with their standard deviation if they are several.

    Example:
        >>> mean_and_deviation([60.0, 62.0]), mean_and_deviation([60.0])
        ('61.0 ± 1.4', '60.0')
    """
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def leader(groups: Sequence[Sequence[float]]) -> int | None:
    """Return which group's mean is ahead of the second by more than either one's standard deviation, or None.

    Example:
        >>> leader([[60.0, 62.0], [70.0, 71.0]]), leader([[60.0, 62.0], [61.0, 63.0]]), leader([[60.0], [70.0]])
        (1, None, None)
    """
    if len(groups) < 2 or min(len(group) for group in groups) < 2:
        return None  # no spread is known
    order = sorted(range(len(groups)), key=lambda index: mean(groups[index]), reverse=True)
    first, second = groups[order[0]], groups[order[1]]
    return order[0] if mean(first) - mean(second) > max(stdev(first), stdev(second)) else None
