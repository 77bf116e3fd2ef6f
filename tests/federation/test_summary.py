"""What a finished run amounts to."""

import math

import pytest

from fedamm_pl.federation.summary import divergence, short_names, summarize, table


def row(round_num: int, accuracy: float, loss: float = 1.0, **more: float) -> dict[str, float]:
    return {"round": round_num, "test/acc": accuracy, "test/loss": loss, "client/loss": 5.0, **more}


def test_final_best_and_mean_of_the_last_ten() -> None:
    history = [row(0, 0.99, 0.1), *(row(number, number / 100, 2 - number / 10) for number in range(1, 13))]
    found = summarize(history)
    assert found["final"] == {"test/acc": 0.12, "test/loss": pytest.approx(0.8)}
    assert found["best"]["test/acc"] == {"value": 0.12, "round": 12}  # round 0 does not count
    assert found["best"]["test/loss"]["round"] == 12
    assert found["mean_last_10"]["test/acc"] == pytest.approx(sum(range(3, 13)) / 1000)


def test_round_0_alone_is_what_there_is() -> None:
    assert summarize([row(0, 0.3)]) == {
        "final": {"test/acc": 0.3, "test/loss": 1.0},
        "best": {"test/acc": {"value": 0.3, "round": 0}, "test/loss": {"value": 1.0, "round": 0}},
        "mean_last_10": {"test/acc": 0.3, "test/loss": 1.0},
    }


def test_the_best_is_a_number_if_there_is_one() -> None:
    found = summarize([row(1, 0.5, math.nan), row(2, 0.25, 3.0), row(3, 0.25, math.inf)])
    assert found["best"]["test/loss"] == {"value": 3.0, "round": 2}
    found = summarize([row(1, 0.5, math.nan), row(2, 0.25, math.nan)])
    assert math.isnan(found["best"]["test/loss"]["value"])


def test_a_metric_that_not_every_row_has_is_summarised_over_those_that_do() -> None:
    found = summarize([row(1, 0.5), row(2, 0.5, **{"test/acc_few": 0.25}), row(3, 0.5, **{"test/acc_few": 0.75})])
    assert found["best"]["test/acc_few"] == {"value": 0.75, "round": 3}
    assert found["mean_last_10"]["test/acc_few"] == 0.5


def test_short_names_are_in_order_and_of_what_is_there() -> None:
    metrics = {"test/acc_few": 0.1, "test/acc": 0.2, "test/acc_class_0": 0.3}
    assert list(short_names(metrics).items()) == [("test/acc", "all"), ("test/acc_few", "few")]


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ([row(0, 0.25), row(1, 0.9)], None),
        ([row(1, 0.9, math.nan)], "the test loss is nan"),
        ([row(1, 0.9, math.inf)], "the test loss is inf"),
        ([row(1, 0.9), row(2, 0.25)], "the test accuracy is 25.0%, that of a constant guess, after 90.0% before"),
        ([row(1, 0.9), row(2, 0.3)], None),
        ([row(0, 0.25), row(1, 0.25)], None),  # it has learned nothing yet
        ([row(1, 0.3), row(2, 0.25)], None),
    ],
)
def test_a_model_has_diverged(history: list[dict[str, float]], reason: str | None) -> None:
    assert divergence(history, chance=0.25) == reason


def test_luck_is_not_learning() -> None:
    assert divergence([row(1, 0.5), row(2, 0.25)], chance=0.25, error=0.06) is None
    assert divergence([row(1, 0.5), row(2, 0.25)], chance=0.25, error=0.04) is not None


def test_the_table_has_a_column_a_group() -> None:
    text = table([row(1, 0.5, **{"test/acc_few": 0.125}), row(2, 0.25, **{"test/acc_few": 0.25})])
    assert text.splitlines() == [
        "test accuracy, %        all      few",
        "final                 25.00    25.00",
        "best (on test)        50.00    25.00",
        "mean of last 2        37.50    18.75",
    ]


def test_clients_own_models_are_summarised_too() -> None:
    history = [{"round": float(r), "test/acc": 0.5, "test/loss": 1.0, "personal/acc": r / 10} for r in range(4)]
    summary = summarize(history)
    assert summary["final"]["personal/acc"] == 0.3
    assert summary["best"]["personal/acc"] == {"value": 0.3, "round": 3}
    assert summary["mean_last_10"]["personal/acc"] == pytest.approx(0.2)
    header, *rows = table(history).splitlines()
    assert header.split() == ["test", "accuracy,", "%", "all", "personal"]
    assert [row.split()[-1] for row in rows] == ["30.00", "30.00", "20.00"]
