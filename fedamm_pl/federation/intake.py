"""Decides in a round which results of clients the server accepts or refuses, and whether enough were accepted."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.aggregation import clip_update
from fedamm_pl.federation.config import MIN_ROBUST_CLIENTS, FederationConfig
from fedamm_pl.federation.soundness import (
    MAX_WHOLE,
    Expected,
    check_failure,
    check_result,
    first_negative,
    first_nonfinite,
    nonnegative,
    shown,
)
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)

OUTLIER = 10.0
"""An update that is at least this many times as long as the median of the others is reported."""


MAX_COLUMNS = 1024
"""Maximum number of client metrics in a run; else a client that sends new ones each round could fill the disk."""


class RoundFailedError(Exception):
    """Raised if a round fails, for example because too few clients succeeded; the server keeps its state."""


def require_sound(state: State, nonnegative: Iterable[str] = ()) -> State:
    """Check the server's next state, and return it.

    Args:
        state: The state.
        nonnegative: Entries of it that cannot be below 0, see :func:`~fedamm_pl.federation.soundness.nonnegative`.

    Raises:
        RoundFailedError: If a tensor of it holds NaN or infinity, or a number below 0 where this is impossible.
    """
    if name := first_nonfinite(state):
        raise RoundFailedError(f"the server's update made {name} NaN or infinite")
    if name := first_negative(state, (name for name in nonnegative if name in state)):
        raise RoundFailedError(f"the server's update put {name} below 0, which is impossible for a variance or count")
    return state


def outlier(norms: Mapping[int, float]) -> tuple[int, float] | None:
    """Find a client whose update is many times as long as those of the others.

    Args:
        norms: Length of the update of each client.

    Returns:
        The client with the longest update and its ratio to the median of the others, if that is 10 or more and there
        are at least three clients; else None.
    """
    if len(norms) < 3:
        return None
    longest = max(norms, key=lambda client: norms[client])
    typical = statistics.median(norm for client, norm in norms.items() if client != longest)
    if typical == 0 or norms[longest] < OUTLIER * typical:
        return None
    return longest, norms[longest] / typical


def client_metrics(results: Sequence[ClientResult]) -> dict[str, float]:
    """Average the metrics of a round's clients, weighted by their examples, and the bytes that a client exchanged.

    A metric is NaN if the client could not measure it: it is left out of the mean and counted. If it is NaN for all
    clients, so is the mean.

    Returns:
        ``client/<name>`` for each metric, ``client/loss_std`` (the spread of the loss over the clients, with the same
        weights), ``client/bytes_received`` and ``client/bytes_sent`` (means over clients); ``client/nan_metrics``, the
        number of metrics that were NaN, if there are any; empty without results.
    """
    if not results:
        return {}
    means = {}
    for name in sorted({name for result in results for name in result.metrics}):
        having = [result for result in results if not math.isnan(result.metrics.get(name, math.nan))]
        examples = sum(result.num_examples for result in having)
        weighted = sum(result.metrics[name] * result.num_examples for result in having)
        means[f"client/{name}"] = mean = weighted / examples if having else math.nan
        if name == "loss":
            variance = sum((result.metrics[name] - mean) ** 2 * result.num_examples for result in having)
            means["client/loss_std"] = math.sqrt(variance / examples) if having else math.nan
    means["client/bytes_received"] = sum(result.bytes_received for result in results) / len(results)
    means["client/bytes_sent"] = sum(result.bytes_sent for result in results) / len(results)
    if unmeasured := sum(math.isnan(value) for result in results for value in result.metrics.values()):
        means["client/nan_metrics"] = float(unmeasured)
    return means


def within_columns(
    metrics: dict[str, float], history: Sequence[Mapping[str, float]], round_num: int
) -> dict[str, float]:
    """Leave out the client metrics for which a run has no more columns.

    Args:
        metrics: The client metrics of a round.
        history: The rows so far.
        round_num: The round, for the log.
    """
    if not history or metrics.keys() <= history[-1].keys():
        return metrics
    known = {name for row in history for name in row if name.startswith("client/")}
    new = sorted(metrics.keys() - known)
    if left_out := new[max(0, MAX_COLUMNS - len(known)) :]:
        text = "round %d: %d metrics of clients are left out; a run records at most %d: %s"
        log.warning(text, round_num, len(left_out), MAX_COLUMNS, line(" ".join(left_out), 100))
    return {name: value for name, value in metrics.items() if name not in left_out}


class Intake:
    """Collects the clients' results of one round.

    Args:
        round_num: The round, for the log.
        tasks: The tasks of the round, each for a different client.
        expected: What each client must return, see :class:`~fedamm_pl.federation.soundness.Expected`.
        module: The method. It determines which entries of a payload are the model, which cannot be below 0, and which
            tallies are expected.
        config: How many clients must succeed, and how long an update may be.
        names: Names of all clients, for the log.

    Attributes:
        results: The results accepted so far, without payloads.
        failures: The clients that failed, and those whose update was refused.
        norms: Length of the accepted update of each client.
        tallies: Sums of the accepted tallies.
    """

    def __init__(
        self,
        round_num: int = 0,
        tasks: Sequence[ClientTask] = (),
        expected: State | None = None,
        module: FederatedModule | None = None,
        config: FederationConfig | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.round_num = round_num
        self.names = names
        self.tasks = {task.client_id: task for task in tasks}
        self.expected = Expected(
            expected or {},
            module.shared if module else ("",),
            module.tallies() if module else {},
            nonnegative(module) if module else (),
        )
        config = config or FederationConfig(0, min_success_fraction=0)
        least = MIN_ROBUST_CLIENTS if config.robust else 1
        self.required = max(least, math.ceil(config.min_success_fraction * len(tasks) - 1e-9))
        self.max_update_norm = config.max_update_norm
        self.watch_outliers = not config.robust and config.max_update_norm is None
        self.results: list[ClientResult] = []
        self.failures: list[ClientFailure] = []
        self.norms: dict[int, float] = {}
        self.tallies: State = {}

    def accept(
        self,
        outcomes: Iterable[ClientResult | ClientFailure],
        contribution: Callable[[ClientResult], ClientResult],
        on_client: Callable[[ClientResult], None],
    ) -> Iterator[ClientResult]:
        """Yield the contributions of the valid results; record and log the others.

        Args:
            outcomes: What the executor returns.
            contribution: Returns a result whose payload is the part of it that is reduced; if it raises a ValueError,
                the result is refused.
            on_client: Called with each accepted result, without its payload, once it has been reduced.

        Raises:
            RoundFailedError: At the end, if too few clients succeeded.
        """
        waiting = dict(self.tasks)
        for outcome in outcomes:
            checked = self._checked(outcome, waiting)
            if isinstance(checked, ClientResult):
                checked = self._contributed(checked, contribution)
            if isinstance(checked, ClientFailure):
                self._fail(checked)
            if not isinstance(checked, ClientResult):
                continue
            yield checked
            self.tallies = {name: self.tallies.get(name, 0) + value for name, value in checked.tallies.items()}
            told = dataclasses.replace(checked, payload={}, tallies={})
            self.results.append(dataclasses.replace(told, kept={}))
            on_client(told)
        for client in waiting:
            self._fail(ClientFailure(client, "lost", "nothing came back"))
        if len(self.results) < self.required:
            raise RoundFailedError(self._shortage())
        if self.watch_outliers and (found := outlier(self.norms)):
            log.warning(
                "round %d: the update of client %s is %.0f times as long as the median of the others; max_update_norm or "
                "a robust aggregation would bound its influence",
                *(self.round_num, shown_client(found[0], self.names), found[1]),
            )

    def _checked(self, outcome: object, waiting: dict[int, ClientTask]) -> ClientResult | ClientFailure | None:
        """Check an outcome of any kind; return a result in plain types, a failure, or None if it names no client."""
        # types are compared because isinstance may raise an exception for an unusual object
        if type(outcome) is not ClientResult and type(outcome) is not ClientFailure:
            log.warning(
                "round %d: the returned object is a %s, not a result", self.round_num, line(type(outcome).__name__)
            )
            return None
        client = outcome.client_id
        if type(client) is not int or not 0 <= client <= MAX_WHOLE:
            log.warning("round %d: the returned result does not name a client but %s", self.round_num, shown(client))
            return None
        try:
            if waiting.pop(client, None) is None:
                raise ValueError("it was not asked for, or came twice")
            if isinstance(outcome, ClientFailure):
                return check_failure(outcome)
            result, norm = check_result(outcome, self.expected)
        except ValueError as error:
            return ClientFailure(client, "update", line(str(error)))
        except Exception as error:  # reading an unusual object may raise any exception
            return ClientFailure(client, "update", f"it cannot be read, {type(error).__name__}")
        self.norms[client] = norm
        return result

    def _contributed(
        self, result: ClientResult, contribution: Callable[[ClientResult], ClientResult]
    ) -> ClientResult | ClientFailure:
        """Return a result whose payload is the part of it that is reduced, or a failure if the method refuses it."""
        shortened = dataclasses.replace(result, payload=self._shortened(result.payload, self.norms[result.client_id]))
        try:
            contributed = contribution(shortened)
            # an unchanged payload has been checked already
            if contributed.payload is not result.payload and (name := first_nonfinite(contributed.payload)):
                raise ValueError(f"what it contributes to {name} is NaN or infinite")
        except (ValueError, ArithmeticError) as error:
            del self.norms[result.client_id]
            return ClientFailure(result.client_id, "update", line(str(error)))
        return contributed

    def _shortened(self, payload: State, norm: float) -> State:
        if self.max_update_norm is None or norm <= self.max_update_norm:
            return payload
        update = {name: value for name, value in payload.items() if name.startswith(self.expected.shared)}
        return {**payload, **clip_update(update, self.expected.payload, self.max_update_norm / norm)}

    def _fail(self, failure: ClientFailure) -> None:
        self.failures.append(failure)
        log.warning("round %d: %s", self.round_num, failure.told_of(shown_client(failure.client_id, self.names)))

    def _shortage(self) -> str:
        if not self.tasks:
            return "none of its clients holds examples"
        counted = f"{len(self.results)} of {len(self.tasks)} clients succeeded, {self.required} or more must"
        last = self.failures[-1]
        return f"{counted}; the last to fail: {last.told_of(shown_client(last.client_id, self.names))}"
