"""The end of a round: evaluates if due, updates the accounts, and calls the callbacks."""

from fedamm_pl.federation.callbacks.base import RoundRecord
from fedamm_pl.federation.callbacks.observers import Observers
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.intake import Intake, client_metrics, within_columns
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.stopwatch import Stopwatch
from fedamm_pl.federation.summary import stalled
from fedamm_pl.protocol.module import CALIBRATED


def close_round(
    run: Run, evaluator: Evaluator, observers: Observers, intake: Intake, failed: str | None, stopwatch: Stopwatch
) -> None:
    """Evaluate if due, update the accounts, and call the callbacks.

    Args:
        run: The run, with the state after the round.
        evaluator: Measures the state.
        observers: The callbacks.
        intake: The accepted results and the failures of the clients.
        failed: Why the round failed, or None.
        stopwatch: Has measured the time since the start of the round.
    """
    state, config, results, (metrics,) = run.state, run.config, intake.results, run.rows
    state.count(intake.failures, failed, config.max_failed_rounds, config.num_rounds)
    metrics.update(within_columns(client_metrics(results), state.history, state.round_num))
    last = state.round_num == config.num_rounds or bool(state.stopped or state.ended)
    due = last or state.round_num % config.eval_interval == 0
    shown = {}
    if due:
        with stopwatch.evaluating():
            metrics.update(evaluator.evaluate(state, last))
        state.history.append({"round": state.round_num, **metrics})
        run.rows.append(state.history[-1])
        evaluator.watch(state)
        evaluator.note_best(state)
        if state.round_num < config.num_rounds:
            state.ended = state.ended or stalled(state.history, config.early_stopping)
        shown = run.module.diagnostics(intake.tallies if failed is None else {})
    seconds = stopwatch.stop()
    client_seconds = {
        "train": sum(result.train_seconds for result in results),
        "meta": sum(result.meta_seconds for result in results),
    }
    if state.round_num:
        state.account(results, seconds, client_seconds)
    if due:
        state.note(shown)
    record = RoundRecord(state.round_num, metrics, due, results, seconds, client_seconds, intake.failures, failed)
    observers.call("on_round_end", run, record)


def evaluate_end(run: Run, evaluator: Evaluator) -> None:
    """Evaluate a run that ends between two evaluations because it was interrupted or a callback ended it.

    If a callback ended the run at an evaluation, it was not known to be the last one. It is repeated if the method
    calibrates the model at the end of a run.
    """
    state = run.state
    if not state.history or not (state.ended or state.round_num == run.config.num_rounds):
        return
    row = state.history[-1]
    if row["round"] < state.round_num:
        state.history.append({"round": state.round_num, **evaluator.evaluate(state, True)})
    elif owed(run, evaluator):
        evaluator.evaluate_again(state)
    else:
        return
    evaluator.note_best(state)


def owed(run: Run, evaluator: Evaluator) -> bool:
    """Return whether a run that is over was evaluated without the calibration that the method does at the end."""
    state = run.state
    if state.round_num == 0 or evaluator.ended_at == state.round_num or not run.module.calibrates(True):
        return False
    return not any(name.startswith(CALIBRATED) for name in state.shared)
