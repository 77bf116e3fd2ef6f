"""Tables of runs as Markdown, LaTeX and CSV: records with one row per finished run, tables with one line per method.

pandas takes a third of a second to import, so functions import it when they need it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from fedamm_pl.federation.summary import LAST, SHOWN, chosen_on
from fedamm_pl.results.statistics import leader, mean_and_deviation
from fedamm_pl.terminal import as_csv as as_field
from fedamm_pl.terminal import printable

if TYPE_CHECKING:
    from pandas import DataFrame

Cells = Sequence[Sequence[tuple[str, bool]]]
"""The lines of a table, the first of which has the headings. A cell is a text, and whether it is bold."""

KINDS = ("final", "best", "mean_last_10")
COSTS = {"bytes_per_round": "MB a round", "seconds_per_round": "s a round"}
COUNTS = ("failed_clients", "refused_updates", "failed_rounds", "resumes")
LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {character: f"{{{character}}}" for character in "[]*"}  # LaTeX takes these as options of a preceding line break
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
    }
)
BOLD = (
    "Bold: the highest mean, where its paired differences from all others have intervals above 0 (Student's t over the shared seeds, "
    "three or more; 95 % over all comparisons by Bonferroni)."
)
"""Note on the numbers that are bold in a table of methods; see :func:`~fedamm_pl.results.statistics.leader`."""
OTHERS = "others"
"""Title of the methods that are in no group."""
MARKDOWN = re.compile(r"[\\`|<>&*\[\]$~]|(?<!\w)_|_(?!\w)")


def averaged(counts: Iterable[int | None]) -> str:
    """Return over how many evaluations the means of runs are taken, as text; files of earlier versions lack the number.

    Example:
        >>> averaged([10, 10]), averaged([3, 10]), averaged([None])
        ('10', '3 to 10', '10 or fewer')
    """
    found = {count or 0 for count in counts}
    if 0 in found or not found:
        return f"{LAST} or fewer"
    return str(max(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"


def titles(counts: Iterable[int | None], chosen: Iterable[str] = ()) -> dict[str, str]:
    """Return kind of result -> its title.

    Args:
        counts: Number of evaluations that the mean of each run is taken over; None if unknown.
        chosen: Sets on which the best results are chosen.
    """
    sets = " or ".join(sorted(set(chosen))) or "test"
    return {"final": "final", "best": f"best on {sets}", "mean_last_10": f"mean of last {averaged(counts)}"}


def row(method: str, seed: int, setting: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a finished run: accuracies in percent, bytes and seconds of wall time per round, incidents.

    Args:
        method: Name of the method in the table.
        seed: Seed of the run.
        setting: Option -> value for the options in which the settings differ.
        summary: Content of summary.json of the run.
    """
    found = {**setting, "method": method, "seed": seed, "uses_meta_set": summary["uses_meta_set"]}
    for kind in KINDS:
        for metric, name in SHOWN.items():
            if metric in summary[kind]:
                value = summary[kind][metric]
                found[f"{kind}/{name}"] = 100 * (value["value"] if isinstance(value, dict) else value)
    if (chosen := chosen_on(summary["final"])) != "test":
        found["best_on"] = chosen
    found["num_averaged"] = summary.get("num_averaged")
    found["bytes_per_round"] = summary["bytes_per_round"]["received"] + summary["bytes_per_round"]["sent"]
    found["seconds_per_round"] = sum(summary["seconds_per_round"].values())
    return found | {name: summary[name] for name in COUNTS}


def in_groups(methods: Iterable[str], groups: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Return the title of each group and its members among the methods; without groups, all methods and an empty title.

    Example:
        >>> in_groups(["a", "b", "c"], {"late": ["c"], "early": ["a"]})
        [('late', ['c']), ('early', ['a']), ('others', ['b'])]
        >>> in_groups(["a", "b"], {})
        [('', ['a', 'b'])]
    """
    names = list(methods)
    if not groups:
        return [("", names)]
    rest = [name for name in names if not any(name in members for members in groups.values())]
    whole = {**groups, OTHERS: [*groups.get(OTHERS, ()), *rest]}
    found = [(title, [name for name in members if name in names]) for title, members in whole.items()]
    return [(title, members) for title, members in found if members]


def heading(title: str, width: int) -> Sequence[tuple[str, bool]]:
    """Return the heading of a block in a table with ``width`` columns."""
    return [(title, True), *[("", False)] * (width - 1)]


def is_heading(line: Sequence[tuple[str, bool]]) -> bool:
    """Return whether a line of a table is the heading of a block; see :func:`heading`."""
    (_, bold), *rest = line
    return bold and bool(rest) and not any(text for text, _ in rest)


def over_settings(settings: Sequence[Sequence[dict[str, Any]]], options: Iterable[str]) -> list[dict[str, Any]]:
    """Average rows over the settings, for each pair of method and seed that all settings have.

    Args:
        settings: The rows of each setting.
        options: The options in which the settings differ; they are left out.

    Example:
        >>> first, second = ({"alpha": alpha, "method": "FedAvg", "seed": 0, "final/all": 60 + alpha} for alpha in (1, 2))
        >>> over_settings([[first], [second]], ["alpha"])
        [{'method': 'FedAvg', 'seed': 0, 'final/all': 61.5}]
    """
    runs = [{(row["method"], row["seed"]): row for row in rows} for rows in settings]
    shared = [[found[run] for found in runs] for run in runs[0] if all(run in found for found in runs)]
    apart, averages = {*options}, list[dict[str, Any]]()
    for rows in shared:
        found: dict[str, Any] = {}
        for name in rows[0]:
            values = [row.get(name) for row in rows]
            if name in apart:
                continue
            if len({*values}) == 1:
                found[name] = values[0]
            elif name == "num_averaged":
                found[name] = None
            elif len(numbers := [value for value in values if isinstance(value, int | float)]) == len(rows):
                found[name] = mean(numbers)
        averages.append(found)
    return averages


def by_method(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of each method, in order."""
    names = dict.fromkeys(row["method"] for row in rows)
    return [(name, [row for row in rows if row["method"] == name]) for name in names]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return group of classes -> method -> ``mean_last_10`` of each seed, for the groups that all runs have."""
    return {
        name: {method: [row[f"mean_last_10/{name}"] for row in mine] for method, mine in by_method(rows)}
        for name in SHOWN.values()
        if all(f"mean_last_10/{name}" in row for row in rows)
    }


def table(rows: Sequence[dict[str, Any]], groups: Mapping[str, Sequence[str]] | None = None) -> Cells:
    """Return the table of the methods.

    Accuracies are mean ± standard deviation over the seeds. :data:`BOLD` explains which numbers are bold.

    Args:
        rows: The rows of the finished runs; see :func:`row`.
        groups: Title -> methods. The table then has a block for each group, and bold print applies within a group.
    """
    from pandas import DataFrame

    frame = DataFrame(rows)
    names = [name for name in SHOWN.values() if f"final/{name}" in frame and frame[f"final/{name}"].notna().all()]
    kinds = titles((row["num_averaged"] for row in rows), (row.get("best_on", "test") for row in rows))
    columns = {f"{kind}/{name}": f"{name}, {title}" for kind, title in kinds.items() for name in names}
    found = dict(iter(frame.groupby("method", sort=False)))
    lines: list[Sequence[tuple[str, bool]]] = [*plain([["method", "seeds", *columns.values(), *COSTS.values()]])]
    for title, methods in in_groups(found, groups or {}):
        lines += [heading(title, len(lines[0]))] if title else []
        seeds = _by_seed(frame[frame["method"].isin(methods)], columns)
        best = {column: leader(seeds[column][methods].to_numpy().T) if len(seeds) else None for column in columns}
        for index, method in enumerate(methods):
            mine = found[method]
            line = [(method + (" †" if mine["uses_meta_set"].iloc[0] else ""), False), (str(len(mine)), False)]
            line += [(mean_and_deviation(mine[column].tolist()), best[column] == index) for column in columns]
            costs = mine["bytes_per_round"].mean() / 1e6, mine["seconds_per_round"].mean()
            lines.append([*line, *((f"{cost:.2f}", False) for cost in costs)])
    return lines


def _by_seed(frame: "DataFrame", columns: Iterable[str]) -> "DataFrame":
    """Return a row for each seed that all methods share, with columns by result and method.

    There are no rows if a method has a seed twice.
    """
    if frame.duplicated(["method", "seed"]).any():
        frame = frame.iloc[:0]
    return frame.set_index(["seed", "method"])[list(columns)].unstack().dropna()


def stacked(cells: Cells) -> Cells:
    """Turn a table with the kinds of accuracy side by side into one with a block of lines for each kind."""
    head = [text for text, _ in cells[0]]
    start, costs = (
        [0, 1],
        list(range(len(head) - len(COSTS), len(head))),
    )  # method and seeds; costs
    found: list[Sequence[tuple[str, bool]]] = []
    for title in dict.fromkeys(text.partition(", ")[2] for text in head[2 : -len(COSTS)]):
        ends = f", {title}"
        order = [*start, *(index for index, text in enumerate(head) if text.endswith(ends)), *costs]
        if not found:
            found.append([(head[index].removesuffix(ends), False) for index in order])
        found.append(heading(title, len(order)))
        found += [[line[index] for index in order] for line in cells[1:]]
    return found


def plain(lines: Sequence[Sequence[str]]) -> Cells:
    """Return the cells of a table in which none is bold."""
    return [[(text, False) for text in line] for line in lines]


def as_markdown(cells: Cells) -> list[str]:
    """Format a table as Markdown."""
    escaped = [[(markdown_text(text), bold) for text, bold in line] for line in cells]
    lines = ["| " + " | ".join(f"**{text}**" if bold else text for text, bold in line) + " |" for line in escaped]
    return [lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]


def as_latex(cells: Cells) -> list[str]:
    """Format a table as LaTeX, for the package booktabs."""
    from pandas import DataFrame

    head, *lines = [
        [rf"\textbf{{{latex_text(text)}}}" if bold else latex_text(text) for text, bold in line] for line in cells
    ]
    style = DataFrame(lines, columns=head).style.hide(axis="index")
    return str(style.to_latex(hrules=True, column_format="l" + "r" * (len(head) - 1))).splitlines()


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Format records as CSV; missing values are empty, and no text can be taken for a spreadsheet formula.

    Example:
        >>> print(as_csv([{"method": "=A1", "seeds": 2}, {"method": "FedAvg"}]), end="")
        method,seeds
        '=A1,2
        FedAvg,
    """
    from pandas import DataFrame

    columns = dict.fromkeys(name for record in records for name in record)
    lines = [[as_field(record.get(name)) for name in columns] for record in records]
    # as objects, since pandas would write whole numbers as floats in columns with gaps
    frame = DataFrame(lines, columns=[as_field(name) for name in columns], dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def markdown_text(text: str) -> str:
    r"""Escape a text for Markdown, in one line.

    Example:
        >>> print(markdown_text("<b>a|b</b>\n"))
        \<b\>a\|b\</b\>\\n
    """
    return MARKDOWN.sub(r"\\\g<0>", printable(text))


def latex_text(text: str) -> str:
    r"""Escape a text for LaTeX, in one line.

    Example:
        >>> print(latex_text("\\input{x}"))
        \textbackslash{}input\{x\}
    """
    return printable(text).translate(LATEX)
