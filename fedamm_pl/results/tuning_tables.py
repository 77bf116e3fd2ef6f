"""The candidates and choices of a tuning on validation: as a table, as records and as text."""

import json
import math
from collections.abc import Iterator
from typing import Any

from fedamm_pl.results.comparison import settings_of
from fedamm_pl.results.tables import Cells, averaged, plain
from fedamm_pl.results.tuning import METRIC, Choice, Tuning, chosen, options_text

CHOSEN = (
    "Options chosen on validation data: the highest val/acc, averaged over {settings}{seeds} and over the last {last} evaluations of each "
    "run. Test accuracy plays no part, except that divergence is detected on the test set, and a candidate with a run that diverged is "
    "ruled out. {counts}"
)


def tuning_cells(tuning: Tuning) -> Cells:
    """Return the table of the choices: a line for each method, or for each method and setting if tuned per setting."""
    settings = any(choice.setting for choice in tuning.choices)
    lines = [["method", *(["setting"] if settings else []), "chosen", "val/acc, %", "candidates", "their range, %"]]
    for choice in tuning.choices:
        place = [", ".join(f"{name} {value}" for name, value in choice.setting.items())] if settings else []
        able = [candidate.accuracy for candidate in choice.candidates if not candidate.faults]
        figures = [f"{max(able):.1f}", str(len(choice.candidates)), f"{min(able):.1f} to {max(able):.1f}"]
        lines.append([choice.method, *place, options_text(chosen(choice)), *figures])
    return plain(lines)


def tuning_legend(tuning: Tuning) -> str:
    """Return a note on how the options were chosen, and from how many configurations."""
    found = [str(seed) for seed in dict.fromkeys(trial.run.seed for trial in tuning.trials)]
    seeds = (
        f"seed {found[0]}, which is in no table"
        if len(found) == 1
        else f"seeds {', '.join(found)}, which are in no table"
    )
    several = len(settings_of(trial.run for trial in tuning.trials)) > 1
    settings = "all settings and " if several and not tuning.choices[0].setting else ""
    summaries = [summary for trial in tuning.trials if (summary := trial.run.summary)]
    last = averaged(summary.get("num_averaged") for summary in summaries)
    return CHOSEN.format(seeds=seeds, settings=settings, last=last, counts=counts_text(tuning.choices))


def counts_text(choices: list[Choice]) -> str:
    """Return a sentence with the number of configurations over which each method was tuned."""
    counts = {choice.method: len(choice.candidates) for choice in choices}
    if len(set(counts.values())) == 1:
        return f"Each method was tuned over {counts[choices[0].method]} configurations."
    each = "; ".join(f"{method} on {count}" for method, count in counts.items())
    return f"The methods were not tuned over the same number of configurations: {each}."


def tuning_notes(tuning: Tuning) -> Iterator[str]:
    """Yield a sentence for each candidate that could not be chosen."""
    for choice in tuning.choices:
        for candidate in choice.candidates:
            if candidate.faults:
                name = f"{choice.method} with {options_text(candidate.options)}"
                yield f"Could not be chosen: {name} ({'; '.join(candidate.faults)})."


def tuning_records(tuning: Tuning) -> list[dict[str, Any]]:
    """Return a record for each run that tried a candidate."""
    found = []
    for trial in tuning.trials:
        accuracy, fault = trial.result
        record = {"method": trial.method, **trial.run.setting, "options": json.dumps(trial.options)}
        record |= {"seed": trial.run.seed, METRIC: accuracy if math.isfinite(accuracy) else None}
        found.append(record | {"state": fault or "finished", "chosen": tuning.has_chosen(trial)})
    return found
