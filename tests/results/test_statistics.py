"""Which method leads, and by how much seeds differ."""

from fedamm_pl.results.statistics import leader, mean_and_deviation


def test_leader_is_ahead_of_the_second_by_more_than_either_spread() -> None:
    assert leader([[60.0, 61.0, 62.0], [63.1, 64.1, 65.1]]) == 1  # 3.1 ahead, both spreads 1
    assert leader([[60.0, 61.0, 62.0], [61.0, 62.0, 63.0]]) is None  # exactly the spread
    assert leader([[50.0, 61.0, 72.0], [64.0, 64.1, 64.2]]) is None  # the second's spread is 11
    assert leader([[64.0, 64.1, 64.2], [50.0, 61.0, 72.0]]) is None
    assert leader([[70.0, 70.1], [10.0, 90.0], [60.0, 60.1]]) == 0  # only the second by mean counts
    assert leader([[60.0, 62.0], [60.0, 62.0]]) is None
    assert leader([[60.0, 60.0], [60.1, 60.1]]) == 1


def test_nothing_leads_alone_or_without_a_spread() -> None:
    assert leader([]) is None
    assert leader([[60.0, 61.0]]) is None
    assert leader([[60.0], [99.0, 99.1]]) is None


def test_deviation_is_that_of_a_sample_and_left_out_for_one_seed() -> None:
    assert mean_and_deviation([60.0, 62.0, 67.0]) == "63.0 ± 3.6"
    assert mean_and_deviation([60.0]) == "60.0"
