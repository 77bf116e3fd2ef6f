"""Which method leads, and by how much seeds differ."""

from fedamm_pl.results.statistics import leader, mean_and_deviation


def test_leader_is_the_one_whose_bar_overlaps_no_other() -> None:
    assert leader([[60.0, 61.0, 62.0], [63.1, 64.1, 65.1]]) == 1  # 3.1 ahead, both spreads 1
    assert leader([[60.0, 61.0, 62.0], [62.0, 63.0, 64.0]]) is None  # exactly both spreads
    assert leader([[60.0, 61.0, 62.0], [61.9, 62.9, 63.9]]) is None  # more than either one, less than both
    assert leader([[50.0, 61.0, 72.0], [69.0, 69.1, 69.2]]) is None  # the second's spread is 11
    assert leader([[69.0, 69.1, 69.2], [50.0, 61.0, 72.0]]) is None
    assert leader([[70.0, 70.1, 70.2], [10.0, 50.0, 90.0], [60.0, 60.1, 60.2]]) is None  # the third's bar ends at 90
    assert leader([[60.0, 62.0, 64.0], [60.0, 62.0, 64.0]]) is None
    assert leader([[60.0, 60.0, 60.0], [60.1, 60.1, 60.1]]) == 1


def test_nothing_leads_alone_or_with_fewer_than_three_seeds() -> None:
    assert leader([]) is None
    assert leader([[60.0, 61.0, 62.0]]) is None
    assert leader([[60.0, 60.1], [99.0, 99.1]]) is None
    assert leader([[60.0, 60.1], [99.0, 99.1, 99.2]]) is None


def test_deviation_is_that_of_a_sample_and_left_out_for_one_seed() -> None:
    assert mean_and_deviation([60.0, 62.0, 67.0]) == "63.0 ± 3.6"
    assert mean_and_deviation([60.0]) == "60.0"
