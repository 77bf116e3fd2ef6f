"""The server's gate in a round: what it takes in from clients, what it refuses, and whether that suffices."""

import dataclasses
import logging
import math
import numbers
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedamm_pl.federation.aggregation import clip_update, update_norm
from fedamm_pl.federation.config import MIN_ROBUST_CLIENTS, FederationConfig
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule

log = logging.getLogger(__name__)

MAX_EXAMPLES = 2**53
"""The largest number up to which all whole numbers are exact in float64."""

OUTLIER = 10.0
"""An update so many times as long as the median of the others is reported."""


class RoundFailedError(Exception):
    """Too little came back from the clients of a round; the server keeps its state."""


def check_result(result: ClientResult, expected: State, shared: tuple[str, ...] = ("",)) -> float:
    """Check what a client returned.

    Args:
        result: The result.
        expected: The names, shapes and types that the payload must have.
        shared: Prefixes of the entries that are the client's model; its update is the difference from the expected values.

    Returns:
        The Euclidean length of the update.

    Raises:
        ValueError: If an entry is missing, unknown, of another shape or type, NaN or infinite, if a metric is no number,
            or the number of examples is not a positive integer. The message says which, in one line.
    """
    if type(result.num_examples) is not int or not 1 <= result.num_examples <= MAX_EXAMPLES:
        raise ValueError(f"it reports {result.num_examples!r:.40} examples")
    for part in ("payload", "metrics"):
        if not isinstance(getattr(result, part), Mapping):
            raise ValueError(f"its {part} is a {type(getattr(result, part)).__name__}, no mapping")
    for name, metric in result.metrics.items():
        if not isinstance(metric, numbers.Real) or (type(metric) is int and abs(metric) > sys.float_info.max):
            raise ValueError(f"its metric {name} is {metric!r:.40}, no number")
    check_tensors(result.payload, expected)
    # one number to wait for on a GPU, not one for each entry
    norm = update_norm(result.payload, {name: value for name, value in expected.items() if name.startswith(shared)})
    beside = {name: value for name, value in result.payload.items() if not name.startswith(shared)}
    if not math.isfinite(norm) or first_nonfinite(beside):
        raise ValueError(f"{first_nonfinite(result.payload) or 'its length'} is NaN or infinite")
    return norm


def check_tensors(payload: Mapping[str, Tensor], expected: State) -> None:
    """Check names, shapes and types of what came back.

    Raises:
        ValueError: If an entry is missing, unknown or of another shape or type.
    """
    if missing := sorted(expected.keys() - payload.keys()):
        raise ValueError(f"it lacks {_some(missing)}")
    if extra := sorted(map(str, payload.keys() - expected.keys())):
        raise ValueError(f"it holds what was not asked for: {_some(extra)}")
    for name, value in payload.items():
        wanted = expected[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, no tensor")
        if value.shape != wanted.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
        if value.layout is not torch.strided or value.is_meta:
            raise ValueError(f"{name} is no dense tensor")
        if value.dtype != wanted.dtype:
            raise ValueError(f"{name} is of type {value.dtype}, expected {wanted.dtype}")


def check_tallies(tallies: Mapping[str, Tensor], expected: State) -> None:
    """Check the tallies of a client.

    Raises:
        ValueError: If an entry is missing, unknown, of another shape or type, NaN or infinite.
    """
    if not isinstance(tallies, Mapping):
        raise ValueError(f"its tallies are a {type(tallies).__name__}, no mapping")
    check_tensors(tallies, expected)
    if name := first_nonfinite(tallies):
        raise ValueError(f"its tally {name} is NaN or infinite")


def require_finite(state: State) -> State:
    """Check the server's next state, and return it.

    Raises:
        RoundFailedError: If a tensor of it holds NaN or infinity.
    """
    if name := first_nonfinite(state):
        raise RoundFailedError(f"the server's update made {name} NaN or infinite")
    return state


def first_nonfinite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


def outlier(norms: Mapping[int, float]) -> tuple[int, float] | None:
    """Find a client whose update is many times as long as those of the others.

    Args:
        norms: Lengths of the updates by client.

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

    Returns:
        ``client/<name>`` for each metric, ``client/loss_std`` (the spread of the loss over the clients, in the same weights),
        ``client/bytes_received`` and ``client/bytes_sent`` (means over clients); empty without results.
    """
    total = sum(result.num_examples for result in results)
    if not total:
        return {}
    means = {}
    for name in sorted({name for result in results for name in result.metrics}):
        having = [result for result in results if name in result.metrics]
        weighted = sum(result.metrics[name] * result.num_examples for result in having)
        examples = sum(result.num_examples for result in having)
        means[f"client/{name}"] = mean = weighted / examples
        if name == "loss":
            variance = sum((result.metrics[name] - mean) ** 2 * result.num_examples for result in having) / examples
            means["client/loss_std"] = math.sqrt(variance)
    means["client/bytes_received"] = sum(result.bytes_received for result in results) / len(results)
    means["client/bytes_sent"] = sum(result.bytes_sent for result in results) / len(results)
    return means


class Intake:
    """What the server takes in during one round.

    Args:
        round_num: The round, for the log.
        tasks: What was asked, each of a different client.
        expected: What each must return, see :func:`check_result`.
        module: The method: what of a payload is the model, and what tallies look like.
        config: How many must succeed, and how long an update may be.

    Attributes:
        results: What was accepted so far, without payloads.
        failures: The clients that failed, and those whose update was refused.
        norms: The lengths of the accepted updates by client.
        tallies: Their tallies, added up.
    """

    def __init__(
        self,
        round_num: int = 0,
        tasks: Sequence[ClientTask] = (),
        expected: State | None = None,
        module: FederatedModule | None = None,
        config: FederationConfig | None = None,
    ) -> None:
        self.round_num = round_num
        self.tasks = {task.client_id: task for task in tasks}
        self.expected = expected or {}
        self.shared = module.shared if module else ("",)
        config = config or FederationConfig(0, min_success_fraction=0)
        least = MIN_ROBUST_CLIENTS if config.robust else 1
        self.required = max(least, math.ceil(config.min_success_fraction * len(tasks) - 1e-9))
        self.max_update_norm = config.max_update_norm
        self.watch_outliers = not config.robust and config.max_update_norm is None
        self.results: list[ClientResult] = []
        self.failures: list[ClientFailure] = []
        self.norms: dict[int, float] = {}
        self.tallies: State = {}
        self._expected_tallies = module.tallies() if module else {}

    def accept(
        self,
        outcomes: Iterable[ClientResult | ClientFailure],
        contribution: Callable[[ClientResult], ClientResult],
        on_client: Callable[[ClientResult], None],
    ) -> Iterator[ClientResult]:
        """Pass on what is sound as what it contributes; note and log the rest.

        Args:
            outcomes: What the executor returns.
            contribution: Gives a result what is reduced of it as its payload, or raises a ValueError: it is refused.
            on_client: Called with each accepted result, without its payload, once it has been reduced.

        Raises:
            RoundFailedError: At the end, if too few clients succeeded.
        """
        waiting = dict(self.tasks)
        for outcome in outcomes:
            task = waiting.pop(outcome.client_id, None)
            if isinstance(outcome, ClientFailure):
                self._fail(outcome)
                continue
            try:
                if task is None:
                    raise ValueError("it was not asked for, or came twice")
                norm = check_result(outcome, self.expected, self.shared)
                check_tallies(outcome.tallies, self._expected_tallies)
                metrics = {str(name): float(metric) for name, metric in outcome.metrics.items()}
                outcome = dataclasses.replace(outcome, metrics=metrics, payload=self._shortened(outcome.payload, norm))
                contributed = contribution(outcome)
            except ValueError as error:
                reason = " ".join(str(error).split())
                self._fail(ClientFailure(outcome.client_id, "update", f"{reason:.300}"))
                continue
            self.norms[outcome.client_id] = norm
            yield contributed
            self.tallies = {name: self.tallies.get(name, 0) + value for name, value in outcome.tallies.items()}
            self.results.append(dataclasses.replace(outcome, payload={}, kept={}, tallies={}))
            on_client(dataclasses.replace(outcome, payload={}, tallies={}))
        for client in waiting:
            self._fail(ClientFailure(client, "lost", "nothing came back"))
        if len(self.results) < self.required:
            raise RoundFailedError(self._shortage())
        if self.watch_outliers and (found := outlier(self.norms)):
            log.warning(
                "round %d: the update of client %d is %.0f times as long as the median of the others; max_update_norm or "
                "a robust aggregation would bound its influence",
                *(self.round_num, *found),
            )

    def _shortened(self, payload: State, norm: float) -> State:
        if self.max_update_norm is None or norm <= self.max_update_norm:
            return payload
        update = {name: value for name, value in payload.items() if name.startswith(self.shared)}
        return {**payload, **clip_update(update, self.expected, self.max_update_norm / norm)}

    def _fail(self, failure: ClientFailure) -> None:
        self.failures.append(failure)
        log.warning("round %d: %s", self.round_num, failure)

    def _shortage(self) -> str:
        if not self.tasks:
            return "none of its clients holds examples"
        counted = f"{len(self.results)} of {len(self.tasks)} clients succeeded, {self.required} or more must"
        return f"{counted}; the last to fail: {self.failures[-1]}"


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
