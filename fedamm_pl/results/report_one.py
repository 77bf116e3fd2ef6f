"""Content of the report of one run: results, key facts, figures, classes, clients, configuration and command."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from fedamm_pl.federation.summary import beside, chosen_on, short_names
from fedamm_pl.results.html import Picture, picture
from fedamm_pl.results.report_facts import class_counts, facts, imbalance, joined, known_facts, percent, rounds
from fedamm_pl.results.runs import Run
from fedamm_pl.results.tables import Cells, plain, titles

MAX_CLIENT_ROWS = 1_000  # with more, a page is slow to open
CAPTIONS = {
    "class_counts": (
        "Training examples per class",
        "The steeper the fall, the longer the tail. Colours show the groups whose accuracies are reported.",
    ),
    "partition": (
        "Examples per client and class",
        "A blank field is a class that a client never sees. The more the rows differ, the more heterogeneous the clients.",
    ),
    "accuracy": (
        "Test accuracy over the rounds",
        "Compare many with few, and see how far single rounds swing before you trust one of them.",
    ),
    "class_accuracy": (
        "Test accuracy per class",
        "From the first evaluation after training began to the last one. Rare classes, at the left, should rise too.",
    ),
    "confusion": (
        "Confusion matrix of the last evaluation",
        "Rows are true classes. Strong fields off the diagonal show which frequent class is predicted in place of a rare one.",
    ),
    "client_accuracy": (
        "Accuracy per client",
        "Measured on examples that each client holds out of training, worst client first, and against the client's size and classes. "
        "A mean can hide clients that gain nothing.",
    ),
    "weight_mapping": (
        "What the weight net has learned",
        "A rising curve gives more weight to hard examples, which are often of rare classes; a falling one gives them less; a flat one is FedAvg.",
    ),
    "class_weights": (
        "Mean weight per class",
        "Above 1, a class counts for more than in FedAvg. The rare ones should end there.",
    ),
}
BEST = {
    "test": "Best is the highest value in each column over all evaluated rounds. It was chosen on the test set and is therefore optimistic.",
    "validation": "Best is the round with the highest accuracy on the validation set (val), the same for all columns.",
}
HEADLINE = (
    "Many, medium and few are means over the classes of each group; groups are made by the number of training examples."
)


@dataclass(frozen=True)
class View:
    """What the page shows of a run below its title; unknown parts are empty.

    Attributes:
        notes: Warnings about the results, such as that the run is unfinished.
        ended: Why the run ended early without a fault.
        headline: Table with final, best and mean of the last ten evaluations.
        legend: Explanation of the headline.
        facts: Term -> fact.
        pictures: The figures.
        classes: A row for each class.
        clients: A row for each client, up to a thousand.
        clients_title: Number of clients as text.
        config: The configuration as YAML.
        command: The command that started the run; None while the run is unfinished.
        origin: Versions and hardware.
    """

    notes: list[str]
    ended: str
    headline: Cells
    legend: str
    facts: dict[str, str]
    pictures: list[Picture]
    classes: Cells
    clients: Cells
    clients_title: str
    config: str
    command: str | None
    origin: dict[str, str]


def single(run: Run) -> dict[str, Any]:
    """Return the content of the page of one run."""
    seed = None if run.seed is None else f"seed {run.seed}"
    title = f"{run.method} on {run.dataset}" if run.dataset else run.method
    return {"title": title, "below": joined(seed, imbalance(run), str(run.path)), "run": view(run)}


def view(run: Run, with_figures: bool = True) -> View:
    """Return what the page shows of a run."""
    pictures, missing = attempted(lambda: drawn(run) if with_figures and run.history else [])
    summary, num_clients = run.summary or {}, len((run.diagnostics or {}).get("client_class_counts") or ())
    return View(
        notes=[*notes(run), *missing],
        ended=f"This run has ended early: {summary['ended']}" if summary.get("ended") else "",
        headline=headline(run),
        legend=f"{BEST[chosen_on(run.results['final'])]} {HEADLINE}" if run.history else "",
        facts=facts(run),
        pictures=pictures,
        classes=classes(run),
        clients=clients(run),
        clients_title=f"the first {MAX_CLIENT_ROWS:,} of " * (num_clients > MAX_CLIENT_ROWS)
        + f"{num_clients:,} clients",
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        command=None if run.summary is None else str(summary.get("command", "")),
        origin=known_facts(
            {
                name.capitalize(): joined(*(f"{part} {value}" for part, value in summary.get(name, {}).items()))
                for name in ("versions", "hardware")
            }
        ),
    )


def drawn(run: Run) -> list[Picture]:
    """Return the figures of a run."""
    return [picture(figure, *captions(name)) for name, figure in run.figures().items()]


def attempted(draw: Callable[[], list[Picture]]) -> tuple[list[Picture], list[str]]:
    """Return the figures; if drawing fails, none and a note, so that the page is still made."""
    try:
        return draw(), []
    except Exception as error:
        return [], [f"The figures are left out: they could not be drawn ({type(error).__name__}: {error})."]


def notes(run: Run) -> list[str]:
    """Return warnings about the results: that the run is unfinished, was stopped or has diverged."""
    if run.summary is None:
        return [f"This run is unfinished: what follows is its state after {rounds(run)}."]
    found, diverged = [], run.summary.get("diverged")
    if run.summary["stopped"]:
        found.append(f"This run has {run.summary['stopped']}")
    if diverged:
        found.append(f"The global model has diverged in round {diverged['round']}: {diverged['reason']}.")
    return found


def headline(run: Run) -> Cells:
    """Return the table of final, best and mean of the last ten evaluations; empty before the first evaluation."""
    if not run.history:
        return []
    results, final = run.results, run.results["final"]
    columns, chosen = {**short_names(final), **beside(final)}, chosen_on(final)
    cells = [["test accuracy, %", *columns.values()]]
    for kind, title in titles([run.num_averaged], [chosen]).items():
        cells.append([title, *(percent(results[kind].get(metric)) for metric in columns)])
        if kind == "best":
            found = (results[kind].get(metric) for metric in columns)
            cells.append(["... in round", *(f"{entry['round']:.0f}" if entry else "" for entry in found)])
    return plain(cells)


def classes(run: Run) -> Cells:
    """Return the table of the classes."""
    counts = class_counts(run)
    if not counts or not run.history:
        return []
    groups = (run.summary or run.diagnostics or {}).get("shot_groups", {})
    group_of = {label: group for group, members in groups.items() for label in members}
    first, last = run.history[0], run.history[-1]
    cells = [["class", "training examples", "group", *(f"round {row['round']:.0f}, %" for row in (first, last))]]
    for label, (name, count) in enumerate(zip(class_names(run), counts, strict=True)):
        column = f"test/acc_class_{label}"
        measured = [percent(row[column]) if column in row else "none in the test set" for row in (first, last)]
        cells.append([name, str(count), group_of.get(label, ""), *measured])
    return plain(cells)


def class_names(run: Run) -> list[str]:
    """Return the names of the classes, or their numbers if the names are unknown."""
    return (run.diagnostics or {}).get("class_names") or list(map(str, range(len(class_counts(run)))))


def clients(run: Run) -> Cells:
    """Return the table of the clients."""
    known_of = run.diagnostics or {}
    counts, accuracies = known_of.get("client_class_counts") or [], known_of.get("client_accuracies") or []
    if not counts:
        return []
    names, classes = known_of.get("client_names") or list(map(str, range(len(counts)))), class_names(run)
    measured = ["accuracy on its own examples, %"] if accuracies else []
    cells = [["client", "training examples", "classes", "largest class", "its share, %", *measured]]
    for index, (name, mine) in enumerate(zip(names[:MAX_CLIENT_ROWS], counts[:MAX_CLIENT_ROWS], strict=True)):
        share = ["", ""]
        if total := sum(mine):
            largest = max(range(len(mine)), key=mine.__getitem__)
            share = [classes[largest], percent(mine[largest] / total)]
        accuracy = [percent(accuracies[index])] if accuracies else []
        cells.append([name, str(total), str(sum(count > 0 for count in mine)), *share, *accuracy])
    return plain(cells)


def captions(name: str) -> tuple[str, str]:
    """Return title and caption of a figure of a run."""
    return CAPTIONS.get(name, (name.replace("_", " ").capitalize(), ""))
