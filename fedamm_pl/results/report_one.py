"""What a report says of one run: results, key facts, figures, classes, configuration, and where it comes from."""

from collections.abc import Callable
from typing import Any, Literal

import yaml

from fedamm_pl.federation.fingerprint import flatten
from fedamm_pl.federation.summary import beside, chosen_on, short_names
from fedamm_pl.results.html import definitions, embedded, escaped, folded, gallery, tabular
from fedamm_pl.results.runs import Run
from fedamm_pl.results.tables import COUNTS, plain, titles

MAX_OPEN_CLASSES = 20  # a longer table is folded up
CAPTIONS = {
    "class_counts": (
        "Training examples per class",
        "The steeper the fall, the longer the tail; the colours are the groups whose accuracies are reported.",
    ),
    "partition": (
        "Examples per client and class",
        "Blank fields are classes that a client never sees; the more the rows differ, the more the clients drift apart.",
    ),
    "accuracy": (
        "Test accuracy over the rounds",
        "Look at the distance between many and few, and at how far single rounds swing before trusting one of them.",
    ),
    "class_accuracy": (
        "Test accuracy of each class",
        "From the first evaluation after training began to the latest: rare classes, at the left, should move up as well.",
    ),
    "confusion": (
        "Confusion in the latest evaluation",
        "A row is a true class: strong fields off the diagonal show which frequent class swallows which rare one.",
    ),
    "client_accuracy": (
        "Accuracy at each client",
        "On the examples that it has held out of training, the worst client first: a mean may hide that some get nothing from it.",
    ),
    "weight_mapping": (
        "What the weight net has learned",
        "A rising curve makes hard examples, and so rare classes, count for more, a falling one for less; a flat one is FedAvg.",
    ),
    "class_weights": (
        "Mean weight of the examples of a class",
        "Above 1 a class counts for more than in FedAvg: the rare ones should end there.",
    ),
}
BEST = {
    "test": "Best is the largest over the evaluated rounds, each column for itself, and chosen on the test set: an optimistic figure.",
    "validation": "Best is that of one round for all columns, the one with the highest accuracy on the validation set (val).",
}
HEADLINE = "Many, medium and few are means over the classes of a group, by training examples."


def single(run: Run) -> tuple[str, str]:
    """Return title and body of the page of one run."""
    title = f"{run.method} on {run.dataset}" if run.dataset else run.method
    seed = None if run.seed is None else f"seed {run.seed}"
    below = ", ".join(filter(None, [seed, imbalance(run), str(run.path)]))
    return title, f'<h1>{escaped(title)}</h1>\n<p class="soft">{escaped(below)}</p>\n{sections(run)}'


def imbalance(run: Run) -> str | None:
    """Return smallest over largest class of what was trained on; a class without images has no reciprocal."""
    if run.summary is None:
        return None
    factor, reciprocal = run.summary["imbalance_factor"], run.summary["IF"]
    return (
        f"imbalance factor {factor:.3g} ({'a class has no examples' if reciprocal is None else f'IF {reciprocal:.4g}'})"
    )


def sections(run: Run, with_figures: bool = True) -> str:
    """Return everything about a run below its title."""
    figures, missing = attempted(lambda: drawn(run) if with_figures and run.history else [])
    parts = [
        *(f'<p class="note">{escaped(note)}</p>' for note in filter(None, [*notes(run), missing])),
        ended(run),
        headline(run),
        "<h2>Key facts</h2>",
        definitions(facts(run)),
        "<h2>Figures</h2>" if figures else "",
        gallery(figures),
        classes(run),
        configuration(run),
        origin(run),
    ]
    return "\n".join(filter(None, parts))


def drawn(run: Run) -> list[str]:
    """Return the figures of a run."""
    return [embedded(figure, *captions(name)) for name, figure in run.figures().items()]


def attempted(draw: Callable[[], list[str]]) -> tuple[list[str], str]:
    """Return figures and an empty text; or none, and what to say of it: the numbers are there without them."""
    try:
        return draw(), ""
    except Exception as error:
        return [], f"The figures are left out: they could not be drawn ({type(error).__name__}: {error})."


def notes(run: Run) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    if run.summary is None:
        return [f"This run is unfinished: what follows is its state after {rounds(run)}."]
    found, diverged = [], run.summary.get("diverged")
    if run.summary["stopped"]:
        found.append(f"This run has {run.summary['stopped']}")
    if diverged:
        found.append(f"The global model has diverged in round {diverged['round']}: {diverged['reason']}.")
    return found


def ended(run: Run) -> str:
    """Return why a run ended before its last round though nothing went wrong."""
    reason = (run.summary or {}).get("ended")
    return f"<p>{escaped(f'This run has ended early: {reason}')}</p>" if reason else ""


def rounds(run: Run) -> str:
    """Return how far a run is."""
    if run.summary is not None:
        return f"{run.summary['num_rounds']} rounds"
    wanted = options(run).get("federation.num_rounds")
    done = f"{run.history[-1]['round']:.0f}" if run.history else "0"
    return f"{done} of {wanted} rounds" if wanted is not None else f"{done} rounds"


def headline(run: Run) -> str:
    """Return the table of final, best and mean of the last ten."""
    if not run.history:
        return "<p>No round has been evaluated yet.</p>"
    results, final = run.results, run.results["final"]
    columns, chosen = {**short_names(final), **beside(final)}, chosen_on(final)
    cells = [["test accuracy, %", *columns.values()]]
    for kind, title in titles([run.num_averaged], [chosen]).items():
        cells.append([title, *(percent(results[kind].get(metric)) for metric in columns)])
        if kind == "best":
            found = (results[kind].get(metric) for metric in columns)
            cells.append(["... in round", *(f"{entry['round']:.0f}" if entry else "" for entry in found)])
    return f'{tabular(plain(cells))}\n<p class="soft">{BEST[chosen]} {HEADLINE}</p>'


def percent(value: float | dict[str, float] | None) -> str:
    """Format an accuracy, or the best one, which comes with its round; empty where there is none.

    Example:
        >>> percent(0.5), percent({"value": 0.5, "round": 3}), percent(None)
        ('50.00', '50.00', '')
    """
    if value is None or (isinstance(value, dict) and value["value"] is None):
        return ""
    return f"{100 * (value['value'] if isinstance(value, dict) else value):.2f}"


def facts(run: Run) -> dict[str, str]:
    """Return term -> fact; what is not known is left out."""
    flat, summary, counts = options(run), run.summary or {}, class_counts(run)
    model, parameters = summary.get("model", flat.get("algorithm.model")), summary.get("num_parameters")
    meta = "uses the server's balanced examples" if summary.get("uses_meta_set") else None
    found = {
        "Method": joined(run.method, meta),
        "Model": joined(known("{}", model), known("{:,} parameters", parameters)),
        "Data": joined(
            run.dataset,
            f"{sum(counts)} training examples in {len(counts)} classes" if counts else None,
            known("{} left over by the partition", summary.get("unused_images") or None),
            known("{} for validation", summary.get("validation_examples") or None),
            known("{} held out by clients", summary.get("local_test_examples") or None),
        ),
        "Clients": joined(
            known(
                "{}",
                flat.get("data.num_clients") or len((run.diagnostics or {}).get("client_class_counts") or ()) or None,
            ),
            known("{:.0%} of them a round", flat.get("federation.client_fraction")),
            known("partition {}", flat.get("data.partition")),
        ),
        "Rounds": joined(rounds(run), known("local epochs {}", flat.get("federation.local_epochs"))),
        "Bytes": traffic(run),
        "Time": time(run),
        "Incidents": joined(*(f"{name.replace('_', ' ')} {summary[name]}" for name in COUNTS if summary.get(name))),
    }
    return {term: fact for term, fact in found.items() if fact}


def known(template: str, value: Any) -> str | None:
    """Format what may not be known."""
    return None if value is None else template.format(value)


def joined(*parts: str | None) -> str:
    """Join what is known."""
    return ", ".join(filter(None, parts))


def traffic(run: Run) -> str:
    """Return the tensor bytes of a round, and of a client in it."""
    if run.summary is not None:
        per_client = [run.summary["bytes_per_round"][f"{way}_per_client"] for way in ("received", "sent")]
    else:
        per_client = [
            run.history[-1].get(f"client/bytes_{way}", 0) if run.history else 0 for way in ("received", "sent")
        ]
    if not any(per_client):
        return ""
    received, sent = (f"{value / 1e3:,.0f} kB" for value in per_client)
    return joined(f"a client receives {received} and sends {sent}", known("{:.2f} MB a round in all", megabytes(run)))


def time(run: Run) -> str:
    """Return the wall time of a round, what it goes on, and the time that clients need, which they may spend side by side."""
    wall, needed = seconds(run), seconds(run, "client_seconds")
    total = sum(wall.values())
    if not total:
        return ""
    shares = ", ".join(f"{kind} {value / total:.0%}" for kind, value in wall.items())
    clients = ", ".join(f"{kind} {value:.2f} s" for kind, value in needed.items())
    return f"{total:.2f} s a round: {shares}; time of all its clients added up: {clients}"


def seconds(run: Run, what: Literal["seconds", "client_seconds"] = "seconds") -> dict[str, float]:
    """Return the seconds of a mean round by kind, by the clock or added up over clients; empty where nothing is known."""
    if run.summary is not None:
        return dict(run.summary[f"{what}_per_round"])
    last = totals(run)[-1:]
    return {kind: value / row["round"] for row in last if row["round"] for kind, value in row[what].items()}


def megabytes(run: Run) -> float | None:
    """Return the megabytes of a mean round, all clients, both ways."""
    if run.summary is not None:
        return float(run.summary["bytes_per_round"]["received"] + run.summary["bytes_per_round"]["sent"]) / 1e6
    return next((float(row["bytes"] / row["round"] / 1e6) for row in totals(run)[-1:] if row["round"]), None)


def totals(run: Run) -> list[dict[str, Any]]:
    """Return bytes and seconds so far at each evaluated round; empty where nothing is known."""
    return list(run.diagnostics["rounds"]) if run.diagnostics else []


def class_counts(run: Run) -> list[int]:
    """Return the training images of each class; empty where nothing is known."""
    return list((run.summary or run.diagnostics or {}).get("class_counts", ()))


def classes(run: Run) -> str:
    """Return the table of the classes."""
    counts = class_counts(run)
    if not counts or not run.history:
        return ""
    names = (run.diagnostics or {}).get("class_names") or list(map(str, range(len(counts))))
    groups = (run.summary or run.diagnostics or {}).get("shot_groups", {})
    group_of = {label: group for group, members in groups.items() for label in members}
    first, last = run.history[0], run.history[-1]
    cells = [["class", "training examples", "group", *(f"round {row['round']:.0f}, %" for row in (first, last))]]
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        column = f"test/acc_class_{label}"
        measured = [percent(row[column]) if column in row else "none in the test set" for row in (first, last)]
        cells.append([name, str(count), group_of.get(label, ""), *measured])
    table = tabular(plain(cells))
    return "<h2>Classes</h2>\n" + (
        table if len(counts) <= MAX_OPEN_CLASSES else folded(f"{len(counts)} classes", table)
    )


def configuration(run: Run) -> str:
    """Return the configuration, folded up."""
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return "<h2>Configuration</h2>\n" + folded("config.yaml", f"<pre>{escaped(text)}</pre>")


def origin(run: Run) -> str:
    """Return command, versions and hardware of a finished run."""
    if run.summary is None:
        return ""
    known_of = {
        name.capitalize(): joined(*(f"{part} {value}" for part, value in run.summary.get(name, {}).items()))
        for name in ("versions", "hardware")
    }
    return "\n".join(
        [
            "<h2>Where it comes from</h2>",
            f'<pre class="command">{escaped(str(run.summary.get("command", "")))}</pre>',
            definitions({term: fact for term, fact in known_of.items() if fact}),
        ]
    )


def captions(name: str) -> tuple[str, str]:
    """Return title and caption of a figure of a run."""
    return CAPTIONS.get(name, (name.replace("_", " ").capitalize(), ""))


def options(run: Run) -> dict[str, Any]:
    """Return the configuration as option -> value."""
    return flatten(run.config) if run.config else {}
