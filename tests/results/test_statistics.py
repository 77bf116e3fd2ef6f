"""Which method leads, by how much seeds differ, and tests of paired differences and of ranks, beside SciPy's own."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedamm_pl.results.statistics import (
    cliques,
    critical_difference,
    friedman_p,
    holm,
    leader,
    mean_and_deviation,
    mean_ranks,
    probability_level,
    sign_flip_p,
    signed_rank_p,
    smallest_p,
    t_interval,
)


def test_leader_by_hand() -> None:
    """The printed t(2, 0.975) is 4.302653: differences of 2, 3 and 4 have the interval 3 ± 4.302653 / sqrt(3), from 0.52."""
    assert leader([[60.0, 61.0, 62.0], [62.0, 64.0, 66.0]]) == 1
    assert leader([[60.0, 61.0, 62.0], [61.0, 63.5, 66.0]]) is None  # 1, 2.5 and 4: 2.5 ± 1.5 · 2.484
    assert leader([[60.0, 62.0, 64.0], [60.0, 62.0, 64.0]]) is None
    assert leader([[60.0, 60.0, 60.0], [60.1, 60.1, 60.1]]) == 1


def test_leader_is_found_seed_by_seed() -> None:
    """Seeds may differ far more than the methods do."""
    assert leader([[50.0, 60.0, 70.0], [51.0, 61.1, 70.9]]) == 1
    assert leader([[50.0, 60.0, 70.0], [61.1, 70.9, 51.0]]) is None


def test_leader_is_ahead_of_each_other_method_and_pays_for_their_number() -> None:
    low, high = [60.0, 61.0, 62.0], [62.0, 64.0, 66.0]
    assert leader([low, high, [61.0, 64.0, 67.0]]) is None
    assert leader([low, high]) == 1
    assert leader([low, high, low]) is None  # t(2, 0.9875) is 6.205: 3 ± 3.58


@pytest.mark.parametrize(("num_methods", "most"), [(2, 70), (4, 50)])
def test_seldom_a_leader_where_all_methods_are_alike(num_methods: int, most: int) -> None:
    """In 1,000 draws two methods have one 50 times on average, with a deviation of 7; more are on the safe side."""
    drawn = np.random.default_rng(0).normal(size=(1000, num_methods, 5))
    found = sum(leader(results) is not None for results in drawn.tolist())
    assert most - 40 <= found <= most if num_methods == 2 else found <= most


def test_nothing_leads_alone_or_with_fewer_than_three_seeds() -> None:
    assert leader([]) is None
    assert leader([[60.0, 61.0, 62.0]]) is None
    assert leader([[60.0, 60.1], [99.0, 99.1]]) is None


def test_deviation_is_that_of_a_sample_and_left_out_for_one_seed() -> None:
    assert mean_and_deviation([60.0, 62.0, 67.0]) == "63.0 ± 3.6"
    assert mean_and_deviation([60.0]) == "60.0"


# Paired differences.

DIFFERENCES = st.lists(st.integers(-300, 300).map(lambda tenths: tenths / 10), min_size=2, max_size=8)
SETTINGS = settings(deadline=None, max_examples=60)


def test_interval_by_hand() -> None:
    """The printed t(3, 0.975) is 3.182446 and t(1, 0.975) is 12.706205."""
    reach = 3.182446 * 2 / math.sqrt(4)  # s² = (9 + 1 + 1 + 1) / 3 = 4
    assert t_interval([5.0, 1.0, 1.0, 1.0]) == pytest.approx((2 - reach, 2 + reach), abs=1e-5)
    assert t_interval([1.0, 3.0]) == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)  # s / sqrt(2) = 1


def test_sign_flips_by_hand() -> None:
    """Of 3, 1 and -2 the sum is 2; the eight sums of flips are ±6, ±4, ±2, 0 and 0."""
    assert sign_flip_p([3.0, 1.0, -2.0]) == 6 / 8
    assert sign_flip_p([3.0, 1.0, 2.0]) == 2 / 8
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p([2.0, 2.0, 2.0, 2.0]) == 2 / 16  # all equal
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a sum of 0, but for rounding


def test_ranks_by_hand() -> None:
    assert signed_rank_p([5.0, 0.0, -1.0, 2.0, 3.0]) == 4 / 16  # 4 - 1 + 2 + 3 = 8; the flips of 10 and 8
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert signed_rank_p([0.1 + 0.2, -0.3]) == 1.0  # equal, but for rounding


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_probability_level_by_hand() -> None:
    """t(1) is Cauchy's distribution: P(|x| < a) = 2 / pi · arctan(a)."""
    assert probability_level([1.0, -1.0]) == pytest.approx(2 / math.pi * math.atan(0.5))
    assert probability_level([1.0, -1.0], half_width=1) == pytest.approx(0.5)
    assert probability_level([0.4, 0.4]) == 1.0
    assert probability_level([0.1 + 0.2, 0.3]) == 1.0
    assert probability_level([-0.6, -0.6]) == 0.0


@SETTINGS
@given(DIFFERENCES)
def test_interval_and_posterior_are_those_of_scipy(values: list[float]) -> None:
    assume(len(set(values)) > 1)
    found = scipy.stats.ttest_rel(np.array(values) + 50, np.full(len(values), 50.0))
    assert t_interval(values) == pytest.approx(tuple(found.confidence_interval()), abs=1e-6)
    posterior = scipy.stats.t(len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert probability_level(values) == pytest.approx(posterior.cdf(0.5) - posterior.cdf(-0.5), abs=1e-6)


@SETTINGS
@given(DIFFERENCES)
def test_sign_flips_are_the_permutation_test_of_scipy(values: list[float]) -> None:
    whole = np.round(10 * np.array(values))  # in tenths no sum is rounded
    found = scipy.stats.permutation_test(
        (whole,),
        lambda x, axis: np.abs(x.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
    )
    assert sign_flip_p(values) == pytest.approx(found.pvalue)


@SETTINGS
@given(st.lists(st.integers(1, 300), min_size=2, max_size=8, unique=True), st.data())
def test_ranks_without_ties_are_the_wilcoxon_test_of_scipy(sizes: list[int], data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=len(sizes), max_size=len(sizes)))
    values = [sign * size / 10 for sign, size in zip(signs, sizes, strict=True)]
    assert signed_rank_p(values) == pytest.approx(scipy.stats.wilcoxon(values, method="exact").pvalue)


@SETTINGS
@given(DIFFERENCES)
def test_other_signs_give_the_same_p_and_the_mirrored_interval(values: list[float]) -> None:
    other = [-value for value in values]
    for test in (sign_flip_p, signed_rank_p, probability_level):
        assert test(values) == pytest.approx(test(other), abs=1e-9)
    (low, high), mirrored = t_interval(values), t_interval(other)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]), abs=1e-9)
    assert low <= np.mean(values) + 1e-9
    assert high >= np.mean(values) - 1e-9
    assert sign_flip_p(values) >= smallest_p(len(values))
    assert 0 <= probability_level(values) <= 1


@SETTINGS
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_the_steps_reject(p_values: list[float]) -> None:
    """Holm's own words: from the smallest on, as long as p is at most alpha / (tests that are left)."""
    corrected = holm(p_values)
    assert all(p <= more <= 1 for p, more in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)
    for alpha in (0.01, 0.05, 0.3):
        kept = [place for place, i in enumerate(order) if p_values[i] * (len(order) - place) > alpha]
        rejected = set(order[: min(kept, default=len(order))])
        assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected


def test_many_seeds_have_drawn_flips_and_the_same_p_each_time() -> None:
    values = list(np.random.default_rng(1).normal(0.3, 1, 17))
    whole = (np.arange(2**17)[:, None] >> np.arange(17)) & 1
    exact = float((np.abs((1 - 2 * whole) @ np.array(values)) >= abs(sum(values)) - 1e-9).mean())
    assert sign_flip_p(values) == pytest.approx(exact, abs=0.008)  # four standard errors at most
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p([1.0] * 30) == smallest_p(30) == 1 / 65536
    assert sign_flip_p([1.0] * 16) == smallest_p(16) == 2 / 65536


@pytest.mark.parametrize("test", [t_interval, sign_flip_p, signed_rank_p, probability_level])
@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, 1.0], []])
def test_what_is_no_number_is_refused(test: Callable[[list[float]], object], values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Expected `differences` to be [12] finite numbers or more, got \["):
        test(values)


@pytest.mark.parametrize("test", [t_interval, probability_level])
def test_one_seed_has_no_spread(test: Callable[[list[float]], object]) -> None:
    with pytest.raises(ValueError, match=r"Expected `differences` to be 2 finite numbers or more, got \[1.0\]"):
        test([1.0])


# Ranks.


def test_critical_differences_are_those_printed() -> None:
    """Demsar's Table 5a, Nemenyi at 0.05: 1.960 for two methods to 3.164 for ten."""
    printed = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for num_methods, quantile in enumerate(printed, 2):
        expected = quantile * math.sqrt(num_methods * (num_methods + 1) / (6 * 10))
        assert critical_difference(num_methods, 10) == pytest.approx(expected, abs=2e-3)


def test_friedman_by_hand_and_with_ties() -> None:
    assert friedman_p([[3.0, 2.0, 1.0]] * 4) == pytest.approx(math.exp(-4))
    assert friedman_p([[1.0, 1.0, 1.0]] * 4) == 1.0
    lines = [[60.0, 61.0, 59.0, 59.0], [50.0, 55.0, 55.0, 41.0], [70.0, 72.0, 71.0, 71.0]]
    assert friedman_p(lines) == pytest.approx(scipy.stats.friedmanchisquare(*zip(*lines, strict=True)).pvalue)


@given(st.lists(st.lists(st.integers(0, 5).map(float), min_size=4, max_size=4), min_size=1, max_size=5))
def test_ranks_have_the_sum_that_ranks_have(lines: list[list[float]]) -> None:
    assert sum(mean_ranks(lines)) == pytest.approx(4 * 5 / 2)
    best = [line.index(max(line)) for line in lines]
    if len(set(best)) == 1 and all(line.count(max(line)) == 1 for line in lines):
        assert mean_ranks(lines)[best[0]] == 1


def test_cliques_are_the_largest_sets_that_the_test_does_not_tell_apart() -> None:
    assert cliques([1.0, 2.0, 3.0], 5.0) == [(1.0, 3.0)]
    assert cliques([1.0, 2.0, 3.0], 0.5) == []
    assert cliques([4.4, 1.0, 3.0, 2.5], 1.6) == [(1.0, 2.5), (2.5, 3.0), (3.0, 4.4)]
    assert cliques([2.0, 2.0, 2.0], 0.5) == [(2.0, 2.0)]
