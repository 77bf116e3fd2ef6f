"""Differences between methods on the same seeds: pairs of runs, and statistics of their differences."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.results.statistics import (
    friedman_p,
    holm,
    mean_ranks,
    probability_level,
    sign_flip_p,
    signed_rank_p,
    smallest_p,
    t_interval,
)
from fedamm_pl.results.tables import by_method, in_groups, titles

LEVEL = 0.5
"""A mean difference below this many points of accuracy counts as no difference."""
ALPHA = 0.05
LEAST_PAIRS, LEAST_METHODS, LEAST_SETTINGS = 2, 3, 2
FIGURE = "mean_last_10"
"""The kind of result that is drawn and ranked."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method minus the reference, in points, over the seeds that all methods share.

    Attributes:
        values: Difference for each seed.
        mean: Mean of the differences.
        interval: 95 % interval of the mean, by Student's t.
        p: p value of the sign-flip test.
        holm: The same, corrected for the number of methods that are compared with the reference.
        wilcoxon: p value of Wilcoxon's signed-rank test, uncorrected.
        level: Probability that the true mean difference is below half a point.
    """

    values: list[float]
    mean: float
    interval: tuple[float, float]
    p: float
    holm: float
    wilcoxon: float
    level: float


@dataclasses.dataclass(frozen=True)
class Paired:
    """The methods of a setting on the seeds that all of them share.

    Attributes:
        setting: The setting as text; empty if there is only one.
        values: Option -> value of the setting.
        reference: The method that is subtracted.
        seeds: Seeds that all methods share.
        columns: ``kind/group`` of a result, such as ``mean_last_10/all`` -> its title.
        accuracies: ``kind/group`` -> method -> accuracy in percent, by seed.
        differences: ``kind/group`` -> method -> its difference from the reference; empty if there is none to show.
        notes: Sentences on methods that are left out, on why nothing is shown, and on the smallest possible p value.
    """

    setting: str
    values: Mapping[str, Any]
    reference: str
    seeds: list[int]
    columns: dict[str, str]
    accuracies: dict[str, dict[str, list[float]]]
    differences: dict[str, dict[str, Difference]]
    notes: list[str]

    @property
    def forest(self) -> dict[str, dict[str, Difference]]:
        """Group -> method -> difference, for the kind of result that is drawn."""
        return {key.partition("/")[2]: found for key, found in self.differences.items() if key.startswith(FIGURE)}


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The mean ranks of methods over several settings; 1 is best.

    Attributes:
        num_settings: Number of settings.
        methods: Methods that all settings have.
        ranks: Group of classes -> mean rank of each method.
        friedman: Group of classes -> p value of Friedman's test that all methods are equal.
    """

    num_settings: int
    methods: list[str]
    ranks: dict[str, list[float]]
    friedman: dict[str, float]


def pair(
    rows: Sequence[dict[str, Any]],
    left_out: Mapping[str, str],
    reference: str | None = None,
    setting: str = "",
    values: Mapping[str, Any] | None = None,
) -> Paired:
    """Compare the methods of a setting with one of them, on the seeds that all share.

    Args:
        rows: One row per finished run, see :func:`~fedamm_pl.results.tables.row`.
        left_out: Method -> why it is left out of the comparison, such as "seed 1 failed".
        reference: The method that is subtracted; None: see :func:`default_reference`.
        setting: The setting as text.
        values: Option -> value of the setting.
    """
    names = list(dict.fromkeys([*(row["method"] for row in rows), *left_out]))
    first = reference or default_reference(names)
    members = [row for row in rows if row["method"] not in left_out]
    methods = {method: {row["seed"]: row for row in mine} for method, mine in by_method(members)}
    seeds = sorted(set[int].intersection(*(set(mine) for mine in methods.values()))) if methods else []
    columns = _columns(members)
    accuracies = {
        key: {method: [mine[seed][key] for seed in seeds] for method, mine in methods.items()} for key in columns
    }
    notes = [f"Left out of the paired differences: {method} ({why})." for method, why in left_out.items()]
    reason = None
    if len(names) < 2:
        notes, reason = [], ""  # with a single method, no reason is needed
    elif first not in methods:
        reason = f"No paired differences: the reference, {first}, has no complete runs."
    elif len(methods) < 2:
        reason = f"No paired differences: only {first} has complete runs."
    elif len(seeds) < LEAST_PAIRS:
        which = f"only {seeds[0]}" if seeds else "none"
        reason = f"No paired differences: at least {LEAST_PAIRS} seeds must be shared by all methods, and these share {which}."
    shown = reason is None
    differences = {key: compared(by_name, first) for key, by_name in accuracies.items()} if shown else {}
    notes += few_seeds(len(seeds), len(methods) - 1) if shown else filter(None, [reason])
    return Paired(setting, values or {}, first, seeds, columns, accuracies, differences, notes)


def default_reference(names: Sequence[str]) -> str:
    """Return the method that the others are compared with: FedAvg, else the first FedAvg with options, else the first.

    Example:
        >>> default_reference(["FedAMM", "FedAvg, lr 0.1", "FedAvg"]), default_reference(["FedAMM", "FedProx"])
        ('FedAvg', 'FedAMM')
    """
    variants = [name for name in names if name.startswith("FedAvg, ")]
    return "FedAvg" if "FedAvg" in names else [*variants, *names, ""][0]


def compared(accuracies: Mapping[str, Sequence[float]], reference: str) -> dict[str, Difference]:
    """Return method -> its difference from the reference.

    Args:
        accuracies: Method -> accuracy in percent for each seed, with the seeds in the same order for all methods.
        reference: One of the methods.
    """
    values = {
        method: [mine - other for mine, other in zip(found, accuracies[reference], strict=True)]
        for method, found in accuracies.items()
        if method != reference
    }
    p_values = {method: sign_flip_p(found) for method, found in values.items()}
    corrected = holm(list(p_values.values()))
    return {
        method: Difference(
            values=found,
            mean=sum(found) / len(found),
            interval=t_interval(found),
            p=p_values[method],
            holm=correction,
            wilcoxon=signed_rank_p(found),
            level=probability_level(found, LEVEL),
        )
        for (method, found), correction in zip(values.items(), corrected, strict=True)
    }


def few_seeds(num_seeds: int, num_compared: int) -> Iterator[str]:
    """Yield a note on the smallest possible p value if so few seeds cannot make it significant after Holm's correction.

    Example:
        >>> print(*few_seeds(3, 1))
        With 3 seeds no p value can be below 0.25 (2/2^3), however large a difference is; 0.05 takes 6 seeds or more.
    """
    least = smallest_p(num_seeds)
    if num_compared * least > ALPHA:
        needed = next(number for number in range(1, 100) if num_compared * smallest_p(number) <= ALPHA)
        after = f", nor below {min(1, num_compared * least):.2g} after Holm's correction for {num_compared} methods"
        yield (
            f"With {num_seeds} seeds no p value can be below {least:.2g} (2/2^{num_seeds}){after if num_compared > 1 else ''}, "
            f"however large a difference is; {ALPHA} takes {needed} seeds or more."
        )


def rank(pairs: Sequence[Paired], among: Collection[str] | None = None) -> Ranks | None:
    """Return the mean ranks of the methods that all settings have, by their means over the seeds.

    Returns None if there are fewer than two settings with paired seeds, or fewer than three such methods: too few for
    the tests.

    Args:
        pairs: The methods of each setting.
        among: Methods to rank; others are ignored. None: all methods.
    """
    found = [paired for paired in pairs if len(paired.seeds) >= LEAST_PAIRS]
    keys = [key for key in (found[0].columns if found else ()) if key.startswith(FIGURE)]
    keys = [key for key in keys if all(key in paired.columns for paired in found)]
    methods = [
        name
        for name in (found[0].accuracies[keys[0]] if keys else ())
        if all(name in paired.accuracies[keys[0]] for paired in found) and (among is None or name in among)
    ]
    if len(found) < LEAST_SETTINGS or len(methods) < LEAST_METHODS:
        return None
    results = {
        key.partition("/")[2]: [
            [sum(paired.accuracies[key][name]) / len(paired.seeds) for name in methods] for paired in found
        ]
        for key in keys
    }
    return Ranks(
        len(found),
        methods,
        {group: mean_ranks(lines) for group, lines in results.items()},
        {group: friedman_p(lines) for group, lines in results.items()},
    )


def rank_within(pairs: Sequence[Paired], groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Ranks]:
    """Return title -> mean ranks within each group of methods; see :func:`rank`.

    Args:
        pairs: The methods of each setting.
        groups: Title -> methods. A group that cannot be ranked is left out. Without groups, all methods are ranked
            under an empty title.
    """
    methods = dict.fromkeys(name for paired in pairs for found in paired.accuracies.values() for name in found)
    ranks = {title: rank(pairs, members) for title, members in in_groups(methods, groups or {})}
    return {title: found for title, found in ranks.items() if found}


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    chosen = {row.get("best_on", "test") for row in rows}
    kinds = titles((row["num_averaged"] for row in rows), chosen)
    shown = [FIGURE] + (["best"] if chosen == {"validation"} else [])  # the best on the test set is optimistic
    groups = [name for name in SHOWN.values() if all(f"{FIGURE}/{name}" in row for row in rows)]
    return {f"{kind}/{name}": f"{name}, {kinds[kind]}" for kind in shown for name in groups}
