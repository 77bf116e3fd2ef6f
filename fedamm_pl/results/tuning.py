"""Choice of options of methods by validation accuracy: the runs that try candidates, and the candidates chosen."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedamm_pl.results.comparison import PlannedRun, flat, plan, require_own_folders, settings_of
from fedamm_pl.results.comparison_config import CompareConfig, TuningConfig
from fedamm_pl.results.reading import TUNING, read_summary

METRIC = "val/acc"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that tries a candidate.

    Attributes:
        method: Name of the method in the table.
        options: Options of the candidate.
        run: The planned run; the name of its method contains the method and the candidate.
    """

    method: str
    options: dict[str, Any]
    run: PlannedRun

    @property
    def stopped(self) -> bool:
        """Whether the run gave up after too many failed rounds; the candidate is the cause, so it is not run again."""
        return bool((read_summary(self.run.folder) or {}).get("stopped"))

    @property
    def result(self) -> tuple[float, str]:
        """Validation accuracy in percent, mean of the last ten evaluations, and why it does not count (else empty)."""
        if (summary := self.run.summary) is None:
            return math.nan, "stopped" if self.stopped else "failed"
        value = summary["mean_last_10"].get(METRIC)
        reason = "diverged" if summary.get("diverged") else "has no validation accuracy" if value is None else ""
        return math.nan if value is None else 100 * value, reason


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate with its result.

    Attributes:
        options: Options of the candidate.
        accuracy: Validation accuracy in percent, mean over its runs.
        faults: Why it cannot be chosen, one text for each faulty run; empty if it can be chosen.
    """

    options: dict[str, Any]
    accuracy: float
    faults: list[str]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidates of a method in one setting, or in all settings, and the one chosen.

    Attributes:
        method: Name of the method in the table.
        setting: Option of the grid -> value; empty if the choice is for all settings.
        candidates: The candidates, in the order of the configuration.
    """

    method: str
    setting: dict[str, Any]
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest accuracy, the first if several are equal; None if none can be chosen."""
        able = [candidate for candidate in self.candidates if not candidate.faults]
        return max(able, key=lambda candidate: candidate.accuracy, default=None)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The runs of a tuning and its choices.

    Attributes:
        trials: The runs that tried candidates.
        choices: The choice for each method, and for each setting if settings are tuned separately.
    """

    trials: list[Trial]
    choices: list[Choice]

    def has_chosen(self, trial: Trial) -> bool:
        """Whether a trial's candidate was chosen for its setting."""
        mine = [choice for choice in self.choices if choice.method == trial.method]
        best = [choice.best for choice in mine if choice.setting in ({}, trial.run.setting)]
        return any(candidate is not None and candidate.options == trial.options for candidate in best)


def plan_trials(
    config: CompareConfig, folder: Path, resolve: Callable[[dict[str, Any]], tuple[str, int]]
) -> list[Trial]:
    """List the runs that try candidates, none if nothing is tuned; see :func:`~fedamm_pl.results.comparison.plan`.

    Raises:
        ValueError: If a candidate's options are wrong, or two candidates of a method give the same run.
    """
    if config.tuning is None:
        return []
    trials: list[Trial] = []
    for method, candidates in config.tuning.methods.items():
        for candidate in candidates:
            try:
                name, options = options_text(candidate), with_candidate(method, config.methods[method], candidate)
            except ValueError as error:
                raise ValueError(f"{method}: {error}") from error
            trying = CompareConfig(config.base, {f"{method}: {name}": options}, config.tuning.seeds, config.grid)
            mine = [Trial(method, candidate, run) for run in plan(trying, folder / TUNING, resolve)]
            alike = [trial for trial in trials if (trial.method, trial.run.config) == (method, mine[0].run.config)]
            if alike:
                raise ValueError(
                    f"Expected candidates of {method} to differ, got {options_text(alike[0].options)} and {name}, which are "
                    "the same run."
                )
            trials += mine
    require_own_folders([trial.run for trial in trials])
    return trials


def plan_chosen(
    config: CompareConfig, folder: Path, resolve: Callable[[dict[str, Any]], tuple[str, int]], tuning: Tuning
) -> list[PlannedRun]:
    """List the runs of a comparison, in which the tuned methods have the chosen options.

    Raises:
        ValueError: If no candidate of a method can be chosen; the message says why.
    """
    runs = []
    for setting in settings_of(trial.run for trial in tuning.trials):
        methods = dict(config.methods)
        for choice in tuning.choices:
            if choice.setting in ({}, setting):
                methods[choice.method] = with_candidate(choice.method, methods[choice.method], chosen(choice))
        grid = {name: [value] for name, value in setting.items()}
        runs += plan(dataclasses.replace(config, methods=methods, grid=grid), folder, resolve)
    return runs


def chosen(choice: Choice) -> dict[str, Any]:
    """Return the options that were chosen.

    Raises:
        ValueError: If no candidate can be chosen; the message says why.
    """
    if choice.best is None:
        why = "; ".join(f"{options_text(found.options)}: {found.faults[0]}" for found in choice.candidates)
        raise ValueError(f"Expected a candidate of {choice.method} whose runs are whole, got none ({why}).")
    return choice.best.options


def with_candidate(method: str, options: Mapping[str, Any] | None, candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a method, overridden by those of a candidate, with the class of the method.

    Example:
        >>> with_candidate("FedAvg", {"init_args": {"lr": 0.1}}, {"lr": 0.3})
        {'class_path': 'FedAvg', 'lr': 0.3}
    """
    return {"class_path": method, **flat(options or {}), **flat(candidate)}


def options_text(options: Mapping[str, Any]) -> str:
    """Return the options of a candidate as text.

    Example:
        >>> options_text({"lr": 0.1, "momentum": 0.0}), options_text({})
        ('lr 0.1, momentum 0.0', 'no change')
    """
    return ", ".join(f"{name} {value}" for name, value in flat(options).items()) or "no change"


def choose(trials: Sequence[Trial], config: TuningConfig) -> Tuning:
    """Choose among the candidates of each method by the validation accuracy of their runs.

    A candidate with a run that failed, stopped, diverged or has no validation accuracy cannot be chosen, since a mean
    over fewer runs is not comparable.
    """
    results = [(trial, *trial.result) for trial in trials]
    settings = settings_of(trial.run for trial in trials) if config.per_setting else [{}]
    choices = []
    for method, candidates in config.methods.items():
        for setting in settings:
            found = []
            for options in candidates:
                mine = [
                    result
                    for result in results
                    if (result[0].method, result[0].options) == (method, options)
                    and setting in ({}, result[0].run.setting)
                ]
                faults = [f"{trial.run.place} {fault}" for trial, _, fault in mine if fault]
                found.append(Candidate(options, mean(value for _, value, _ in mine), faults))
            choices.append(Choice(method, setting, found))
    return Tuning(list(trials), choices)
