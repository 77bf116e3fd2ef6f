"""Base classes of executors with several workers, which may be processes of this machine or actors of a cluster."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fedamm_pl.cores import shared_out
from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.slots import Wait, run_on_slots
from fedamm_pl.federation.executors.worker import NOBODY
from fedamm_pl.federation.fingerprint import differences, hashes
from fedamm_pl.protocol.codec import decode
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.terminal import line

STARTING = 600.0
"""Time limit in seconds for a worker to import the libraries and load its data."""


class Pool(Executor):
    """Trains clients on several workers, each of which loads the data itself.

    Args:
        num_workers: Number of workers.
        threads_per_worker: Threads per worker; by default the threads of the main process, up to the number of cores, divided equally.
        client_timeout: Time limit per client in seconds; null for none.
        max_retries: How often a client is trained again after its worker died or its time was up.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        num_workers: int = 2,
        threads_per_worker: int | None = None,
        client_timeout: float | None = None,
        max_retries: int = 1,
    ) -> None:
        for name, least in (("num_workers", 1), ("threads_per_worker", 1), ("max_retries", 0)):
            if (value := locals()[name]) is not None and value < least:
                raise ValueError(f"Expected `{name}` to be {least} or more, got {value}.")
        if client_timeout is not None and not 0 < client_timeout < math.inf:
            raise ValueError(f"Expected `client_timeout` to be a number above 0 or null, got {client_timeout}.")
        self.num_workers = num_workers
        self.threads_per_worker = threads_per_worker
        self.client_timeout = client_timeout
        self.max_retries = max_retries

    @property
    def workers_here(self) -> int:
        """Number of workers, if they are processes of this machine."""
        return self.num_workers

    def threads(self, threads: int) -> int:
        """Return the number of threads per worker, given the number of threads of this process."""
        return self.threads_per_worker or shared_out(threads, self.num_workers)

    def for_workers(self, spec: RunSpec) -> RunSpec:
        """Return the specification for the workers, with their number of threads."""
        return replace(spec, threads=self.threads(spec.threads))


class PoolSlot(ABC):
    """A slot that exchanges messages with its worker as bytes.

    Args:
        place: Number of the slot.

    Attributes:
        ready: Whether its worker has started and is idle.
        environment: The environment of all workers, once it is known; a worker that is restarted must have the same.
    """

    def __init__(self, place: int) -> None:
        self.place = place
        self.ready = False
        self.environment: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the worker in messages."""
        return f"worker {self.place}"

    @abstractmethod
    def started(self) -> dict[str, Any]:
        """Wait for the worker and return its environment.

        Raises:
            ValueError: If it ends before it is ready, sends something else, or differs from the other workers.
        """

    @abstractmethod
    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        """Give the worker a client, see :class:`~fedamm_pl.federation.executors.slots.Slot`."""

    @abstractmethod
    def receive(self) -> Outcome | None:
        """Return what the worker has sent, see :class:`~fedamm_pl.federation.executors.slots.Slot`."""

    @abstractmethod
    def restart(self) -> None:
        """End the worker and start another one."""

    def environment_in(self, content: bytes) -> dict[str, Any]:
        """Return the environment that a worker reports after its start, and mark the worker as ready.

        Raises:
            ValueError: If the worker reports an error, sends something unreadable, or differs from the other workers.
        """
        try:
            found = dict(json.loads(content))
        except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"Expected {self.name} to start, got one that sends something else.") from error
        if "error" in found:
            raise ValueError(f"Expected {self.name} to start, got: {line(str(found['error']))}")
        if self.environment is not None:
            require_same(self.environment, found, self.name)
        self.ready = True
        return found

    def outcome_in(self, content: bytes) -> Outcome:
        """Return the outcome that a worker has sent, and mark the worker as ready.

        Raises:
            EOFError: If the message is not the outcome of a client; the worker can then no longer be used.
        """
        try:
            outcome = decode(content)
        except ValueError as error:
            raise EOFError(f"its worker sent a message that cannot be read: {line(str(error))}") from error
        if not isinstance(outcome, ClientResult | ClientFailure):
            raise EOFError(f"its worker sent a {type(outcome).__name__}, not a result")
        if outcome.client_id == NOBODY and isinstance(outcome, ClientFailure):
            raise EOFError(outcome.reason)
        self.ready = True
        return outcome


class PoolRunner(Runner):
    """Trains clients on several workers, each in a slot.

    Args:
        options: The executor: number of workers, time limit and retries.
        spec: What the workers build module and data from.
        start: A pickled spec and the number of a slot -> the slot, whose worker is starting.
        wait: Waits for slots.

    Raises:
        ValueError: If workers cannot be started, or do not see the same data.
    """

    def __init__(self, options: Pool, spec: RunSpec, start: Callable[[bytes, int], PoolSlot], wait: Wait) -> None:
        self.options = options
        self._data = spec.data
        self._wait = wait
        content = spec.pickled()
        self._slots: list[PoolSlot] = []
        try:
            for place in range(options.num_workers):
                self._slots.append(start(content, place))
            environments = [slot.started() for slot in self._slots]
            self.environment = {**environments[0], **hashes(spec.data)}
            for slot, environment in zip(self._slots, environments, strict=True):
                require_same(self.environment, environment, slot.name)
                slot.environment = self.environment
        except BaseException:
            self.close()
            raise

    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task, see :class:`Runner`."""
        options = self.options
        return run_on_slots(
            self._slots,
            self._wait,
            broadcast,
            tasks,
            kept,
            meanwhile,
            timeout=options.client_timeout,
            start_timeout=STARTING,
            max_retries=options.max_retries,
            names=self._data.client_names,
            size=lambda task: self._data.client_size(task.client_id),
        )

    @property
    def busy(self) -> tuple[int, int]:
        """Number of workers that are training a client or starting, and number of all workers."""
        return sum(not slot.ready for slot in self._slots), len(self._slots)


def require_same(expected: dict[str, Any], environment: dict[str, Any], name: str) -> None:
    """Check that a worker has the same environment as the others.

    Raises:
        ValueError: If it does not; the message names the differences.
    """
    if found := differences(expected, environment):
        raise ValueError(f"Expected all workers to see and use the same, got {name}: {'; '.join(found)}.")
