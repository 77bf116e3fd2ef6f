"""The results of a run: final, best and mean of the last ten evaluations."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

SHOWN = {"test/acc": "all", "test/acc_many": "many", "test/acc_medium": "medium", "test/acc_few": "few"}
BESIDE = {
    "val/acc": "val",
    "local/acc_mean": "clients",
    "local/acc_worst_tenth": "worst 10%",
    "personal/acc": "personal",
}
"""Further metrics that a table shows."""
SUMMARISED = ("test/", "val/", "local/", "personal/")
SMALLEST = ("test/loss", "local/acc_std")
"""Metrics for which smaller is better."""
LAST = 10
STALLED = "val/acc has not risen"
"""The beginning of the reasons that :func:`stalled` returns."""


def short_names(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return metric -> short name for the overall and grouped accuracies among these metrics, in order."""
    return {metric: name for metric, name in SHOWN.items() if metric in metrics}


def summarize(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Summarise the metrics of a run, on the test set, on the validation set and at the clients.

    Args:
        history: A row for each evaluated round.

    Returns:
        ``final``: the values of the last row. ``best``: for each metric its ``value`` and ``round``. With a validation
        set, all of them are from one round, the one with the highest ``val/acc``; else each is the largest accuracy or
        smallest loss, chosen on the test set and therefore optimistic. ``mean_last_10``: mean of the last ten evaluated
        rounds, round 0 excluded (of round 0 alone if there is no other).
    """
    rows = after_start(history)
    final = {name: value for name, value in rows[-1].items() if name.startswith(SUMMARISED)}
    best: dict[str, dict[str, float]] = {}
    chosen = validated(history)
    for name in final:
        pick = min if name in SMALLEST else max
        if not (measured := [row for row in ([chosen] if chosen else rows) if name in row]):
            continue
        row = pick([row for row in measured if math.isfinite(row[name])] or measured, key=lambda row: row[name])
        best[name] = {"value": row[name], "round": row["round"]}
    last = rows[-num_averaged(history) :]
    mean = {name: sum(values) / len(values) for name in final if (values := [row[name] for row in last if name in row])}
    return {"final": final, "best": best, "mean_last_10": mean}


def curve(history: Sequence[Mapping[str, float]], spent: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the accuracies of the evaluated rounds and the bytes exchanged until then.

    :func:`within` uses them to summarise a part of a run.

    Args:
        history: A row for each evaluated round.
        spent: Rows with ``round`` and ``bytes`` exchanged so far; rounds without such a row are left out.

    Returns:
        ``round``, ``bytes``, and each accuracy of a table -> its value in each evaluated round.
    """
    so_far = {row["round"]: row["bytes"] for row in spent}
    rows = [row for row in history if row["round"] in so_far]
    names = [name for name in (*SHOWN, "val/acc") if all(name in row for row in rows)] if rows else []
    spent_then = {"round": [row["round"] for row in rows], "bytes": [so_far[row["round"]] for row in rows]}
    return spent_then | {name: [row[name] for row in rows] for name in names}


def within(summary: Mapping[str, Any], budget: float) -> dict[str, Any] | None:
    """Return the summary of a run as if it had ended with its last evaluation within a budget of bytes.

    Args:
        summary: The content of its summary.json, with its ``curve``.
        budget: Bytes that may have been exchanged.

    Returns:
        The summary with the accuracies, ``num_averaged`` and ``num_rounds`` of that part of the run; None if it
        contains no evaluation after round 0.
    """
    columns = summary["curve"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    part = [row for row in rows if row["bytes"] <= budget]
    if not part or part[-1]["round"] == 0:
        return None
    spent = {"num_averaged": num_averaged(part), "num_rounds": int(part[-1]["round"])}
    return {**summary, **summarize(part), **spent}


def beside(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return metric -> short name for the metrics that a table shows besides those of :func:`short_names`, in order."""
    return {metric: name for metric, name in BESIDE.items() if metric in metrics}


def after_start(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the rows except that of round 0, or the row of round 0 if there is no other."""
    return [row for row in history if row["round"] > 0] or list(history)


def validated(history: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the row with the highest ``val/acc``, or None without a validation set.

    Round 0 is excluded if there are other rounds; of equal rows the first is taken.
    """
    rows = [row for row in after_start(history) if "val/acc" in row]
    return max(rows, key=lambda row: row["val/acc"]) if rows else None


def best_is(metrics: Collection[str]) -> str:
    """Return a description of how ``best`` is chosen, given the metrics of a run."""
    if chosen_on(metrics) == "validation":
        return (
            "all metrics in the evaluated round with the highest accuracy on the validation set, the first of several"
        )
    return "largest accuracy and smallest loss over the evaluated rounds, chosen on the test set"


def chosen_on(metrics: Collection[str]) -> str:
    """Return on which set ``best`` is chosen, given the metrics of a run: validation if there is one, else test."""
    return "validation" if "val/acc" in metrics else "test"


def stalled(history: Sequence[Mapping[str, float]], patience: int | None) -> str | None:
    """Return why a run ends early.

    Args:
        history: A row for each evaluated round.
        patience: Number of evaluations in a row without a higher ``val/acc`` after which a run ends; None: no limit.

    Returns:
        One line if there are that many evaluations after the best one, round 0 excluded; else None.
    """
    best = validated(history)
    if patience is None or best is None:
        return None
    since = sum(row["round"] > best["round"] for row in history)
    if since < patience:
        return None
    return f"{STALLED} above the {best['val/acc']:.2%} of round {best['round']:.0f} for {since} evaluations (early_stopping {patience})"


def num_averaged(history: Sequence[Mapping[str, float]]) -> int:
    """Return the number of evaluations in ``mean_last_10``: ten, or as many as there are after round 0."""
    return min(LAST, sum(row["round"] > 0 for row in history) or len(history))


def divergence(history: Sequence[Mapping[str, float]], chance: float, error: float = 0.0) -> str | None:
    """Return how the global model has diverged in the last evaluation.

    Args:
        history: A row for each evaluated round.
        chance: Accuracy of the best constant guess.
        error: Standard error of a guess's accuracy on the test set, ``sqrt(chance * (1 - chance) / num_images)``.

    Returns:
        One line if the test loss is NaN or infinite, or if the accuracy is at most a hundredth of the way from chance
        to 1 after it was above chance by more than a tenth of that way and more than five standard errors; else None.
    """
    loss, accuracy = history[-1]["test/loss"], history[-1]["test/acc"]
    best = max(row["test/acc"] for row in history)
    if not math.isfinite(loss):
        return f"the test loss is {loss}"
    if best > chance + max(0.1 * (1 - chance), 5 * error) and accuracy <= chance + 0.01 * (1 - chance):
        return f"the test accuracy is {accuracy:.1%}, that of a constant guess, after {best:.1%} before"
    return None


def table(history: Sequence[Mapping[str, float]]) -> str:
    """Format final, best and mean of the last ten for all, many, medium and few, in percent."""
    summary = summarize(history)
    columns = {**short_names(summary["final"]), **beside(summary["final"])}
    widths = [max(9, len(name) + 2) for name in columns.values()]
    heads = [f"{name:>{width}}" for name, width in zip(columns.values(), widths, strict=True)]
    best = f"best (on {chosen_on(summary['final'])})"
    first = max(18, len(best) + 1)
    lines = [f"{'test accuracy, %':<{first}}" + "".join(heads)]
    for title, key in (
        ("final", "final"),
        (best, "best"),
        (f"mean of last {num_averaged(history)}", "mean_last_10"),
    ):
        values = [summary[key].get(metric, math.nan) for metric in columns]
        numbers = [value["value"] if isinstance(value, dict) else value for value in values]
        cells = [f"{100 * number:{width}.2f}" for number, width in zip(numbers, widths, strict=True)]
        lines.append(f"{title:<{first}}" + "".join(cells))
    return "\n".join(lines)
