"""Statistics over seeds: spread, paired differences between two methods, and ranks of methods over several settings.

The paired tests are those of J. Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006.
The probability that two methods differ by less than a margin follows A. Benavoli et al., "Time for a Change: a Tutorial
for Comparing Multiple Classifiers Through Bayesian Analysis", JMLR 18, 2017. SciPy takes a second to import, so
functions import it when they need it.
"""

from collections.abc import Sequence
from functools import cache
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

LEAST_SEEDS = 3
MOST_EXACT = 16
"""Largest number of differences for which all sign flips are tried; these are 65,536."""
DRAWN_FLIPS = 65_535
"""Number of sign flips that are drawn if there are more differences."""
DIGITS = 9
"""Decimal places of differences in points; further ones are rounding errors."""


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean over seeds, with the standard deviation if there are several.

    Example:
        >>> mean_and_deviation([60.0, 62.0]), mean_and_deviation([60.0])
        ('61.0 ± 1.4', '60.0')
    """
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def leader(results: Sequence[Sequence[float]], level: float = 0.05) -> int | None:
    """Return the index of the method that is significantly better than all others; None if there is none.

    The method with the highest mean leads if Student's interval of its paired difference from each other method lies
    above 0, with confidence 1 - level / (k - 1) for k methods (Bonferroni). If the differences are normal, the
    probability that a method leads without being the best is then at most ``level``. At least three seeds are needed.

    Args:
        results: A row for each method, with one result for each of the seeds that all methods share, in the same order.
        level: Largest probability of an error.

    Example:
        >>> leader([[60.0, 62.0, 64.0], [70.0, 72.1, 73.9]]), leader([[60.0, 62.0, 64.0], [70.0, 61.0, 73.0]])
        (1, None)
    """
    values = np.asarray(results, dtype=np.float64)
    if len(values) < 2 or values.shape[1] < LEAST_SEEDS:
        return None
    first = int(values.mean(1).argmax())
    differences = np.delete(values[first] - values, first, axis=0)
    confidence = 1 - level / len(differences)
    return first if all(t_interval(row, confidence)[0] > 0 for row in differences) else None


# Paired differences of two methods, one per seed.


def t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of the mean: mean ± t(n - 1, (1 + confidence) / 2) · s / sqrt(n).

    Args:
        differences: One per seed, n in total, at least two; s is their standard deviation.
        confidence: Share of such intervals that contain the true mean, if the differences are normal.

    Raises:
        ValueError: If a difference is not finite, or there are fewer than two.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])  # t(2, 0.975) = 4.3027
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    from scipy.stats import t

    values = _checked(differences, 2)
    reach = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * _standard_error(values)
    return float(values.mean() - reach), float(values.mean() + reach)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p value of the sign-flip test of paired differences; its statistic is the size of their sum.

    If the two methods are equal, each difference is equally likely with either sign. p is the share of all 2^n sign
    flips whose statistic is at least as large as the observed one, so it is never below 2 / 2^n. For more than 16
    differences, 65,535 flips are drawn, the same in each call, and the observed signs count as one more (Phipson and
    Smyth 2010).

    Args:
        differences: One per seed, n in total.

    Raises:
        ValueError: If a difference is not finite, or there is none.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0]), sign_flip_p([1.0, 2.0, -3.0])
        (0.25, 1.0)
    """
    values = _checked(differences, 1)
    observed, slack = (
        abs(values.sum()),
        1e-9 * np.abs(values).sum(),
    )  # sums in a different order differ in their last digits
    as_large = int((np.abs(_signs(len(values)) @ values) >= observed - slack).sum())
    return as_large / 2 ** len(values) if len(values) <= MOST_EXACT else (1 + as_large) / (1 + DRAWN_FLIPS)


def smallest_p(num_differences: int) -> float:
    """Return the smallest p value that :func:`sign_flip_p` can have for a number of differences.

    Example:
        >>> smallest_p(3), smallest_p(6)
        (0.25, 0.03125)
    """
    return 2 / 2**num_differences if num_differences <= MOST_EXACT else 1 / (1 + DRAWN_FLIPS)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Return the two-sided p value of Wilcoxon's signed-rank test: :func:`sign_flip_p` of the signed ranks.

    Ranks are those of the sizes of the differences. Differences of 0 are left out, and ties get their mean rank.
    Without ties this is the usual exact test; with ties it is still exact.

    Args:
        differences: One per seed.

    Raises:
        ValueError: If a difference is not finite, or there is none.

    Example:
        >>> signed_rank_p([1.0, 2.0, 30.0, -4.0])  # ranks 1, 2, 4 and -3: 10 of 16 flips have a sum of 4 or more
        0.625
    """
    from scipy.stats import rankdata

    values = _checked(differences, 1).round(DIGITS)
    values = values[values != 0]
    return sign_flip_p(np.sign(values) * rankdata(np.abs(values))) if len(values) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for the number of tests by Holm's procedure.

    With m tests, the k-th smallest p value is multiplied by m + 1 - k. The result is raised to that of the next smaller
    p value if it is below it, and limited to 1.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.

    Args:
        p_values: p values of m tests, each in [0, 1].

    Returns:
        The corrected p values, in the same order.

    Example:
        >>> holm([0.25, 0.125, 0.5])
        [0.5, 0.375, 0.5]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def probability_level(differences: Sequence[float], half_width: float = 0.5) -> float:
    """Return the probability that the true mean difference lies within ± half_width, given the differences.

    This is the correlated t-test of Benavoli et al. with correlation 0, since each seed draws a new split, new clients
    and new weights. The posterior of the mean under a flat prior is Student's t with n - 1 degrees of freedom, centred
    at the observed mean, with scale s / sqrt(n).

    Args:
        differences: One per seed, n in total, at least two. If all are equal, the probability is 0 or 1.
        half_width: Half the width of the region that counts as no difference, in the unit of the differences.

    Raises:
        ValueError: If a difference is not finite, or there are fewer than two.

    Example:
        >>> round(probability_level([1.0, 0.0, -1.0]), 3)  # P(|t(2)| < 0.5 / 0.577) = 0.866 / sqrt(2 + 0.866²)
        0.522
    """
    from scipy.stats import t

    values = _checked(differences, 2)
    center, scale = values.mean(), _standard_error(values)
    if scale == 0:
        return float(abs(center) < half_width)
    above, below = ((end - center) / scale for end in (half_width, -half_width))
    return float(t.cdf(above, len(values) - 1) - t.cdf(below, len(values) - 1))


# Ranks of several methods over several settings.


def mean_ranks(results: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean rank of each method over the settings; 1 is best, and ties share their mean rank.

    Args:
        results: A row for each setting, with the result of each of k methods; the highest is the best.

    Returns:
        Mean ranks, of length k.

    Example:
        >>> mean_ranks([[60.0, 70.0, 50.0], [60.0, 60.0, 50.0]])
        [1.75, 1.25, 3.0]
    """
    return [float(rank) for rank in _ranks(results).mean(0)]


def friedman_p(results: Sequence[Sequence[float]]) -> float:
    """Return the p value of Friedman's test that all methods are equal, corrected for ties; see :func:`mean_ranks`.

    For N settings and k methods, the test compares 12 N / (k (k + 1)) · (sum of squared mean ranks - k (k + 1)² / 4)
    with the chi-squared distribution with k - 1 degrees of freedom. This is a good approximation if N is above 10 and k
    above 5 (Demsar).

    Args:
        results: A row for each setting, with the result of each of three methods or more.

    Example:
        >>> round(friedman_p([[3.0, 2.0, 1.0]] * 4), 4)  # 12·4/12 · (1 + 4 + 9 - 12) = 8, and exp(-8 / 2)
        0.0183
    """
    from scipy.stats import friedmanchisquare

    ranks = _ranks(results)
    if (ranks == ranks[:, :1]).all():  # all tied: 0 / 0
        return 1.0
    return float(friedmanchisquare(*ranks.T).pvalue)


def critical_difference(num_methods: int, num_settings: int, alpha: float = 0.05) -> float:
    """Return the critical difference of two mean ranks in Nemenyi's test: q · sqrt(k (k + 1) / (6 N)).

    q is the upper quantile of the studentized range for k means and infinitely many degrees of freedom, divided by
    sqrt(2).

    Args:
        num_methods: Number of methods k, two or more.
        num_settings: Number of settings N.
        alpha: Probability that the mean ranks of any two methods differ by this much if all methods are equal.

    Example:
        >>> round(critical_difference(4, 14), 2)  # 2.569 · sqrt(20 / 84), as in Demsar
        1.25
    """
    from scipy.stats import studentized_range

    quantile = float(studentized_range.ppf(1 - alpha, num_methods, np.inf)) / 2**0.5
    return quantile * float((num_methods * (num_methods + 1) / (6 * num_settings)) ** 0.5)


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """Return the lowest and highest rank of each maximal set of methods with mean ranks less than a difference apart.

    Example:
        >>> cliques([3.0, 1.0, 2.0, 5.0], 1.5)
        [(1.0, 2.0), (2.0, 3.0)]
    """
    ordered, found = sorted(ranks), list[tuple[float, float]]()
    for start, low in enumerate(ordered):
        high = max(rank for rank in ordered if rank == low or rank - low < difference)
        if start + 1 < len(ordered) and ordered[start + 1] <= high and (not found or high > found[-1][1]):
            found.append((low, high))
    return found


def _checked(differences: Sequence[float], least: int) -> NDArray[np.float64]:
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < least or not np.isfinite(values).all():
        raise ValueError(f"Expected `differences` to be {least} finite numbers or more, got {list(differences)}.")
    return values


def _standard_error(values: NDArray[np.float64]) -> float:
    spread = 0.0 if not np.ptp(values.round(DIGITS)) else float(values.std(ddof=1))
    return spread / float(np.sqrt(len(values)))


@cache
def _signs(count: int) -> NDArray[np.float64]:
    if count <= MOST_EXACT:
        flips = (np.arange(2**count)[:, None] >> np.arange(count)) & 1  # (2^n, n)
    else:
        flips = np.random.default_rng(0).integers(0, 2, (DRAWN_FLIPS, count))
    return np.asarray(1.0 - 2.0 * flips, dtype=np.float64)


def _ranks(results: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(-np.asarray(results, dtype=np.float64).round(DIGITS), axis=1))  # (N, k)
