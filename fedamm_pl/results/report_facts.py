"""Facts about a run as text for its report, and the numbers in them."""

from typing import Any, Literal

from fedamm_pl.federation.fingerprint import flatten
from fedamm_pl.results.runs import Run
from fedamm_pl.results.tables import COUNTS


def facts(run: Run) -> dict[str, str]:
    """Return term -> fact about a run; unknown facts are left out."""
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
    return known_facts(found)


def known_facts(facts: dict[str, str]) -> dict[str, str]:
    """Leave out facts without a text."""
    return {term: fact for term, fact in facts.items() if fact}


def known(template: str, value: Any) -> str | None:
    """Format a value; None if it is unknown."""
    return None if value is None else template.format(value)


def joined(*parts: str | None) -> str:
    """Join the known parts with commas."""
    return ", ".join(filter(None, parts))


def traffic(run: Run) -> str:
    """Return the tensor bytes that a client receives and sends, and those of a round, as text."""
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
    """Return the wall time of a round and its parts, and the added time of its clients, which may run in parallel."""
    wall, needed = seconds(run), seconds(run, "client_seconds")
    total = sum(wall.values())
    if not total:
        return ""
    shares = ", ".join(f"{kind} {value / total:.0%}" for kind, value in wall.items())
    clients = ", ".join(f"{kind} {value:.2f} s" for kind, value in needed.items())
    return f"{total:.2f} s a round: {shares}; time of all its clients added up: {clients}"


def seconds(run: Run, what: Literal["seconds", "client_seconds"] = "seconds") -> dict[str, float]:
    """Return kind of work -> mean seconds per round; empty if unknown.

    Args:
        run: The run.
        what: ``seconds`` of wall time, or ``client_seconds`` added up over clients.
    """
    if run.summary is not None:
        return dict(run.summary[f"{what}_per_round"])
    last = totals(run)[-1:]
    return {kind: value / row["round"] for row in last if row["round"] for kind, value in row[what].items()}


def megabytes(run: Run) -> float | None:
    """Return the mean megabytes per round of all clients in both directions; None if unknown."""
    if run.summary is not None:
        return float(run.summary["bytes_per_round"]["received"] + run.summary["bytes_per_round"]["sent"]) / 1e6
    return next((float(row["bytes"] / row["round"] / 1e6) for row in totals(run)[-1:] if row["round"]), None)


def totals(run: Run) -> list[dict[str, Any]]:
    """Return the bytes and seconds so far at each evaluated round; empty if unknown."""
    return list(run.diagnostics["rounds"]) if run.diagnostics else []


def class_counts(run: Run) -> list[int]:
    """Return the number of training images of each class; empty if unknown."""
    return list((run.summary or run.diagnostics or {}).get("class_counts", ()))


def imbalance(run: Run) -> str | None:
    """Return the ratio of the smallest to the largest training class, and its reciprocal, as text; None if unknown.

    There is no reciprocal if a class has no images.
    """
    if run.summary is None:
        return None
    factor, reciprocal = run.summary["imbalance_factor"], run.summary["IF"]
    return (
        f"imbalance factor {factor:.3g} ({'a class has no examples' if reciprocal is None else f'IF {reciprocal:.4g}'})"
    )


def rounds(run: Run) -> str:
    """Return the number of completed rounds as text; for an unfinished run also the number of all rounds, if known."""
    if run.summary is not None:
        return f"{run.summary['num_rounds']} rounds"
    wanted = options(run).get("federation.num_rounds")
    done = f"{run.history[-1]['round']:.0f}" if run.history else "0"
    return f"{done} of {wanted} rounds" if wanted is not None else f"{done} rounds"


def options(run: Run) -> dict[str, Any]:
    """Return the configuration of a run as option -> value; a run made from Python has only its data set."""
    return {**({"data.dataset": run.dataset} if run.dataset else {}), **flatten(run.config)}


def percent(value: float | dict[str, float] | None) -> str:
    """Format an accuracy in percent, or the best one, which comes with its round; empty if there is none.

    Example:
        >>> percent(0.5), percent({"value": 0.5, "round": 3}), percent(None)
        ('50.00', '50.00', '')
    """
    if value is None or (isinstance(value, dict) and value["value"] is None):
        return ""
    return f"{100 * (value['value'] if isinstance(value, dict) else value):.2f}"
