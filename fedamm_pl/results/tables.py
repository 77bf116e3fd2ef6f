"""Tables over runs: a row for each finished run, a line for each method, as Markdown and as LaTeX."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from fedamm_pl.federation.summary import SHOWN
from fedamm_pl.results.statistics import leader, mean_and_deviation

Cells = Sequence[Sequence[tuple[str, bool]]]
"""The lines of a table, the first of them the headings: texts, and whether each is bold."""

KINDS = {"final": "final", "best": "best on test", "mean_last_10": "mean of last 10"}
COSTS = {"bytes_per_round": "MB a round", "seconds_per_round": "s a round"}
COUNTS = ("failed_clients", "refused_updates", "failed_rounds", "resumes")
LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
    }
)


def row(method: str, seed: int, setting: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a finished run: accuracies in percent, bytes and seconds of wall time a round, incidents.

    Args:
        method: Its name in the table.
        seed: Its seed.
        setting: Option -> value, of the options that tell apart the table's settings.
        summary: The content of its summary.json.
    """
    found = {**setting, "method": method, "seed": seed, "uses_meta_set": summary["uses_meta_set"]}
    for kind in KINDS:
        for metric, name in SHOWN.items():
            if metric in summary[kind]:
                value = summary[kind][metric]
                found[f"{kind}/{name}"] = 100 * (value["value"] if isinstance(value, dict) else value)
    found["bytes_per_round"] = summary["bytes_per_round"]["received"] + summary["bytes_per_round"]["sent"]
    found["seconds_per_round"] = sum(summary["seconds_per_round"].values())
    return found | {name: summary[name] for name in COUNTS}


def by_method(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of each method, in order."""
    names = dict.fromkeys(row["method"] for row in rows)
    return [(name, [row for row in rows if row["method"] == name]) for name in names]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return group of classes -> method -> mean of the last ten of each seed, of the groups that all runs have."""
    return {
        name: {method: [row[f"mean_last_10/{name}"] for row in mine] for method, mine in by_method(rows)}
        for name in SHOWN.values()
        if all(f"mean_last_10/{name}" in row for row in rows)
    }


def table(rows: Sequence[dict[str, Any]]) -> Cells:
    """Return the table of the methods.

    Accuracies are mean ± standard deviation over the seeds. The best of a column is bold where it is ahead of the second by
    more than either one's standard deviation.
    """
    names = [name for name in SHOWN.values() if all(f"final/{name}" in row for row in rows)]
    columns = {f"{kind}/{name}": f"{name}, {title}" for kind, title in KINDS.items() for name in names}
    groups = by_method(rows)
    lines = [[(title, False) for title in ("method", "seeds", *columns.values(), *COSTS.values())]]
    best = {column: leader([[row[column] for row in mine] for _, mine in groups]) for column in columns}
    for index, (method, mine) in enumerate(groups):
        line = [(method + (" †" if mine[0]["uses_meta_set"] else ""), False), (str(len(mine)), False)]
        line += [(mean_and_deviation([row[column] for row in mine]), best[column] == index) for column in columns]
        line.append((f"{mean(row['bytes_per_round'] for row in mine) / 1e6:.2f}", False))
        line.append((f"{mean(row['seconds_per_round'] for row in mine):.2f}", False))
        lines.append(line)
    return lines


def stacked(cells: Cells) -> Cells:
    """Return a table of all kinds of accuracy side by side as one with a block of lines for each kind."""
    head = [text for text, _ in cells[0]]
    start, costs = [0, 1], list(range(len(head) - len(COSTS), len(head)))  # method and seeds; what comes last
    found: list[Sequence[tuple[str, bool]]] = []
    for title in KINDS.values():
        ends = f", {title}"
        order = [*start, *(index for index, text in enumerate(head) if text.endswith(ends)), *costs]
        if not found:
            found.append([(head[index].removesuffix(ends), False) for index in order])
        found.append([(title, True), *[("", False)] * (len(order) - 1)])
        found += [[line[index] for index in order] for line in cells[1:]]
    return found


def plain(lines: Sequence[Sequence[str]]) -> Cells:
    """Return the cells of a table without bold ones."""
    return [[(text, False) for text in line] for line in lines]


def as_markdown(cells: Cells) -> list[str]:
    """Format a table as Markdown."""
    escaped = [[(text.replace("|", "\\|"), bold) for text, bold in line] for line in cells]
    lines = ["| " + " | ".join(f"**{text}**" if bold else text for text, bold in line) + " |" for line in escaped]
    return [lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]


def as_latex(cells: Cells) -> list[str]:
    """Format a table as LaTeX, for the package booktabs."""
    lines = [
        " & ".join(rf"\textbf{{{t.translate(LATEX)}}}" if bold else t.translate(LATEX) for t, bold in line)
        for line in cells
    ]
    body = [line + r" \\" for line in lines]
    columns = "l" + "r" * (len(cells[0]) - 1)
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
