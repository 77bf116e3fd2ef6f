"""Differences between methods on the same seeds as tables, and what there is to say of them in words."""

import csv
import io
from collections.abc import Sequence

from fedamm_pl.results.pairs import ALPHA, Paired, Ranks
from fedamm_pl.results.statistics import critical_difference
from fedamm_pl.results.tables import Cells, plain
from fedamm_pl.terminal import as_csv

HEAD = ("95 % interval", "p", "p, Holm", "p, Wilcoxon", "within 0.5")
LEGEND = (
    "Differences in points, seed by seed, of test accuracy. Interval: of the mean, by Student's t. p: sign flips of the differences, "
    "two-sided; Holm: the same, corrected for the number of methods; Wilcoxon: signed ranks, uncorrected. Within 0.5: the "
    "probability that the true mean difference is below half a point, given these seeds. All of it speaks of further seeds on the "
    "same data, not of other data."
)
RANKS = (
    "Mean ranks of the methods over {settings} settings, 1 the best, by their means over the seeds. Friedman: p value that all are "
    "alike, which takes settings for independent; it is rough for fewer than ten. Two methods differ by Nemenyi's test at 0.05 where "
    "their mean ranks are {difference:.2f} apart."
)


def difference_cells(paired: Paired) -> Cells:
    """Return the table of the differences: a block of lines for each result and group, a line for each method."""
    lines: list[Sequence[tuple[str, bool]]] = [*plain([["method", f"minus {paired.reference}", *HEAD]])]
    for key, found in paired.differences.items():
        lines.append([(paired.columns[key], True), *[("", False)] * (1 + len(HEAD))])
        for method, difference in found.items():
            low, high = difference.interval
            figures = [f"{difference.mean:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            chances = [p_text(p) for p in (difference.p, difference.holm, difference.wilcoxon)]
            lines += plain([[method, *figures, *chances, f"{difference.level:.2f}"]])
    return lines


def p_text(p: float) -> str:
    """Format a p value.

    Example:
        >>> p_text(0.25), p_text(0.0004)
        ('0.250', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rank_cells(ranks: Ranks) -> Cells:
    """Return the table of the mean ranks: a line for each method, and one for Friedman's test."""
    lines = [["method", *ranks.ranks]]
    for index, method in enumerate(ranks.methods):
        lines.append([method, *(f"{found[index]:.2f}" for found in ranks.ranks.values())])
    return plain([*lines, ["Friedman, p", *map(p_text, ranks.friedman.values())]])


def rank_legend(ranks: Ranks) -> str:
    """Say what the mean ranks are."""
    difference = critical_difference(len(ranks.methods), ranks.num_settings, ALPHA)
    return RANKS.format(settings=ranks.num_settings, difference=difference)


def shared_seeds(paired: Paired) -> str:
    """Say which seeds are paired."""
    seeds = ", ".join(map(str, paired.seeds))
    return f"Paired differences from {paired.reference}, over the seeds {seeds}."


def as_csv_text(pairs: Sequence[Paired]) -> str:
    """Format all differences as CSV, a row for each setting, result, group and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    options = list(dict.fromkeys(name for paired in pairs for name in paired.values))
    columns = ["result", "group", "method", "reference", "seeds", "difference", "low", "high"]
    writer.writerow(map(as_csv, [*options, *columns, "p_sign_flip", "p_holm", "p_wilcoxon", "probability_within_0.5"]))
    for paired in pairs:
        for key, found in paired.differences.items():
            for method, difference in found.items():
                start = [*(paired.values.get(name, "") for name in options), *key.split("/"), method, paired.reference]
                figures = [len(paired.seeds), difference.mean, *difference.interval, difference.p, difference.holm]
                writer.writerow(map(as_csv, [*start, *figures, difference.wilcoxon, difference.level]))
    return text.getvalue()
