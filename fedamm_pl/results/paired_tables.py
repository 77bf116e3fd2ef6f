"""Tables of the differences between methods on the same seeds, and the texts that explain them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedamm_pl.results.pairs import ALPHA, LEAST_METHODS, LEAST_PAIRS, Paired, Ranks
from fedamm_pl.results.statistics import critical_difference
from fedamm_pl.results.tables import Cells, heading, in_groups, plain

HEAD = ("95 % interval", "p", "p, Holm", "p, Wilcoxon", "within 0.5")
LEGEND = (
    "Differences in test accuracy, in points, paired by seed. Interval: of the mean, by Student's t. p: two-sided sign-flip test; "
    "Holm: the same, corrected for the number of methods; Wilcoxon: signed-rank test, uncorrected. Within 0.5: the probability that "
    "the true mean difference is below half a point, given these seeds. All of this is about further seeds on the same data, not "
    "about other data."
)
RANKS = (
    "Mean ranks of the methods over {settings} settings, by their means over the seeds; 1 is best. Friedman: p value of the test that "
    "all methods are equal; it assumes independent settings and is approximate for fewer than ten. By Nemenyi's test at 0.05, two "
    "methods differ if their mean ranks are at least {difference} apart."
)
WITHIN = "Methods are ranked within their group only."


def difference_cells(paired: Paired, groups: Mapping[str, Sequence[str]] | None = None) -> Cells:
    """Return the table of the differences: a block for each result and group of classes, with a line for each method.

    Args:
        paired: The differences.
        groups: Title -> methods; each result then has a block for each group of methods.
    """
    lines: list[Sequence[tuple[str, bool]]] = [*plain([["method", f"minus {paired.reference}", *HEAD]])]
    for key, found in paired.differences.items():
        for title, methods in in_groups(found, groups or {}):
            lines.append(heading(f"{paired.columns[key]}: {title}" if title else paired.columns[key], len(lines[0])))
            for method in methods:
                difference = found[method]
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


def rank_cells(ranks: Mapping[str, Ranks]) -> Cells:
    """Return the table of the mean ranks: a line for each method, and one for Friedman's test.

    Args:
        ranks: Title of a group of methods -> the ranks in it. Without groups, there is one entry with an empty title.
    """
    lines: list[Sequence[tuple[str, bool]]] = [*plain([["method", *next(iter(ranks.values())).ranks]])]
    for title, mine in ranks.items():
        lines += [heading(title, len(lines[0]))] if title else []
        for index, method in enumerate(mine.methods):
            lines += plain([[method, *(f"{found[index]:.2f}" for found in mine.ranks.values())]])
        lines += plain([["Friedman, p", *map(p_text, mine.friedman.values())]])
    return lines


def rank_legend(ranks: Mapping[str, Ranks]) -> str:
    """Return the legend of the table of mean ranks; see :func:`rank_cells`."""
    differences = []
    for title, mine in ranks.items():
        difference = critical_difference(len(mine.methods), mine.num_settings, ALPHA)
        differences.append(f"{difference:.2f}" + (f" ({title})" if title else ""))
    within = f" {WITHIN}" if any(ranks) else ""
    return RANKS.format(settings=next(iter(ranks.values())).num_settings, difference=", ".join(differences)) + within


def group_notes(
    pairs: Mapping[str, Paired], groups: Mapping[str, Sequence[str]], ranks: Mapping[str, Ranks]
) -> Iterator[str]:
    """Yield notes on what groups of methods mean for the tables, and on which of them have no mean ranks."""
    if groups:
        yield "Bold marks the leader of a group: methods of different groups are not ranked against each other."
    methods = dict.fromkeys(name for paired in pairs.values() for found in paired.accuracies.values() for name in found)
    unranked = [title for title, _ in in_groups(methods, groups) if title not in ranks]
    if groups and unranked and len(pairs) > 1:
        yield (
            f"No mean ranks for: {'; '.join(unranked)}. Ranks need at least {LEAST_METHODS} methods in a group with complete runs in all "
            f"settings, and at least {LEAST_PAIRS} seeds that all methods share."
        )


def shared_seeds(paired: Paired) -> str:
    """Return a sentence that lists the paired seeds."""
    seeds = ", ".join(map(str, paired.seeds))
    return f"Paired differences from {paired.reference}, over the seeds {seeds}."


def paired_records(pairs: Iterable[Paired]) -> list[dict[str, Any]]:
    """Return a record for each setting, result, group of classes and method."""
    return [
        {
            **paired.values,
            **dict(zip(("result", "group"), key.split("/"), strict=True)),
            "method": method,
            "reference": paired.reference,
            "seeds": len(paired.seeds),
            "difference": difference.mean,
            **dict(zip(("low", "high"), difference.interval, strict=True)),
            "p_sign_flip": difference.p,
            "p_holm": difference.holm,
            "p_wilcoxon": difference.wilcoxon,
            "probability_within_0.5": difference.level,
        }
        for paired in pairs
        for key, found in paired.differences.items()
        for method, difference in found.items()
    ]
