"""What a finished run amounts to: final, best and mean of the last ten evaluations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = {"test/acc": "all", "test/acc_many": "many", "test/acc_medium": "medium", "test/acc_few": "few"}
LAST = 10


def short_names(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return metric -> short name for the overall and grouped accuracies among these metrics, in order."""
    return {metric: name for metric, name in SHOWN.items() if metric in metrics}


def summarize(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Summarise the test metrics of a run, those of the clients' own models among them.

    Args:
        history: A row for each evaluated round.

    Returns:
        ``final``: the values of the last row. ``best``: for each metric its ``value`` and ``round``, the largest accuracy
        or smallest loss; chosen on the test set, so an optimistic figure. ``mean_last_10``: mean of the last ten
        evaluated rounds, round 0 excluded (of round 0 alone if there is no other).
    """
    rows = [row for row in history if row["round"] > 0] or list(history)
    final = {name: value for name, value in rows[-1].items() if name.startswith(("test/", "personal/"))}
    best: dict[str, dict[str, float]] = {}
    for name in final:
        pick = min if name == "test/loss" else max
        measured = [row for row in rows if name in row]
        row = pick([row for row in measured if math.isfinite(row[name])] or measured, key=lambda row: row[name])
        best[name] = {"value": row[name], "round": row["round"]}
    last = rows[-num_averaged(history) :]
    mean = {name: sum(values) / len(values) for name in final if (values := [row[name] for row in last if name in row])}
    return {"final": final, "best": best, "mean_last_10": mean}


def num_averaged(history: Sequence[Mapping[str, float]]) -> int:
    """Return over how many evaluations ``mean_last_10`` is the mean: ten, or as many as there are after round 0."""
    return min(LAST, sum(row["round"] > 0 for row in history) or len(history))


def divergence(history: Sequence[Mapping[str, float]], chance: float, error: float = 0.0) -> str | None:
    """Say how the global model has diverged in the last evaluation.

    Args:
        history: A row for each evaluated round.
        chance: Accuracy of the best constant guess.
        error: Standard error of a guess's accuracy on the test set, ``sqrt(chance * (1 - chance) / num_images)``.

    Returns:
        One line if the test loss is NaN or infinite, or the accuracy is within a hundredth of the way from chance to 1
        after it was above a tenth of it and by five standard errors; else None.
    """
    loss, accuracy = history[-1]["test/loss"], history[-1]["test/acc"]
    best = max(row["test/acc"] for row in history)
    if not math.isfinite(loss):
        return f"the test loss is {loss}"
    if best > chance + max(0.1 * (1 - chance), 5 * error) and accuracy <= chance + 0.01 * (1 - chance):
        return f"the test accuracy is {accuracy:.3f}, that of a constant guess, after {best:.3f} before"
    return None


def table(history: Sequence[Mapping[str, float]]) -> str:
    """Format final, best and mean of the last ten for all, many, medium and few, in percent."""
    summary = summarize(history)
    columns = short_names(summary["final"])
    if "personal/acc" in summary["final"]:
        columns["personal/acc"] = "personal"
    lines = [f"{'test accuracy, %':<18}" + "".join(f"{name:>9}" for name in columns.values())]
    for title, key in (
        ("final", "final"),
        ("best (on test)", "best"),
        (f"mean of last {num_averaged(history)}", "mean_last_10"),
    ):
        values = [summary[key][metric] for metric in columns]
        numbers = [value["value"] if isinstance(value, dict) else value for value in values]
        lines.append(f"{title:<18}" + "".join(f"{100 * number:9.2f}" for number in numbers))
    return "\n".join(lines)
