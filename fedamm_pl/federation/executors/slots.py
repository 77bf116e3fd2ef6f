"""The loop of executors with several workers: assigns clients, yields results in order, and replaces dead workers."""

import bisect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.executors.base import Kept, Outcome
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientTask, State

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""Number of workers in a row that die without a client, after which the run ends."""


class WorkerLostError(OSError):
    """Raised when workers keep dying before they train a client."""


class Slot(Protocol):
    """Holds a worker that trains one client at a time, and replaces it if it dies.

    Attributes:
        ready: Whether its worker has started and is idle.
    """

    ready: bool

    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        """Give the worker a client. If the broadcast is new to the worker, it takes it up first."""
        ...

    def receive(self) -> Outcome | None:
        """Return the outcome that the worker has sent, or None if it has just started.

        Raises:
            EOFError: If the worker has died; the message says how.
        """
        ...

    def restart(self) -> None:
        """End the worker, whatever it is doing, and start another one without waiting until it is ready."""
        ...


Wait = Callable[[Sequence[Slot], float | None], Sequence[Slot]]
"""Slots and a time limit in seconds (None: no limit) -> the slots whose worker has sent something or has died."""


def run_on_slots(
    slots: Sequence[Slot],
    wait: Wait,
    broadcast: Broadcast,
    tasks: Sequence[ClientTask],
    kept: Kept,
    meanwhile: Callable[[], None] | None = None,
    *,
    timeout: float | None = None,
    start_timeout: float | None = None,
    max_retries: int = 1,
    names: Sequence[str] = (),
    size: Callable[[ClientTask], int] = lambda task: 0,
) -> Iterator[Outcome]:
    """Train the client of each task, see :meth:`Runner.run`.

    Each worker has one client at a time, so a dead worker or a client that exceeds its time limit does not affect other
    clients. Such a client is trained again with the same seed, up to ``max_retries`` times; then it counts as lost.
    Only the next tasks in order, twice as many as there are workers, may be assigned before the first of them is
    yielded; the longest of these is assigned first.

    Args:
        slots: The workers.
        wait: Waits for the workers.
        broadcast: What the server sends to all clients.
        tasks: Which clients to train.
        kept: Returns the private state of a client.
        meanwhile: Called once, after the idle workers have been given their first clients.
        timeout: Time limit per client in seconds; None for no limit.
        start_timeout: Time limit for the start of a worker in seconds; None for no limit.
        max_retries: How often a client is trained again after its worker died or its time was up.
        names: Names of all clients, for the log.
        size: Returns the length of a task, in any unit; of equally long tasks the first is assigned first.

    Raises:
        WorkerLostError: If three workers in a row die, or do not start in time, before they train a client.
    """
    waiting, window = list(enumerate(tasks)), 2 * len(slots)  # tasks in order
    running: dict[int, tuple[int, ClientTask, float]] = {}  # slot -> index of the task, task, when it was assigned
    starting = {place: time.monotonic() for place, slot in enumerate(slots) if not slot.ready}  # slot -> start time
    done: dict[int, Outcome] = {}
    attempts: Counter[int] = Counter()
    failed_starts = following = 0
    calls = [meanwhile] if meanwhile else []

    def lose(place: int, reason: str) -> None:
        """Replace a worker; put its client back into the queue, or record it as lost."""
        nonlocal failed_starts
        slots[place].restart()
        starting[place] = time.monotonic()
        if place not in running:  # it was not training a client
            failed_starts += 1
            if failed_starts >= MAX_FAILED_STARTS:
                raise WorkerLostError(
                    0, f"{failed_starts} workers in a row died before they trained a client: {reason}"
                )
            return
        index, task, _ = running.pop(place)
        attempts[index] += 1
        if attempts[index] <= max_retries:
            name = shown_client(task.client_id, names)
            log.warning("round %d: client %s is trained again: %s", broadcast.round_num, name, reason)
            bisect.insort(waiting, (index, task), key=lambda entry: entry[0])
            return
        times = f" ({attempts[index]} times)" if attempts[index] > 1 else ""
        done[index] = ClientFailure(task.client_id, "lost", reason + times)

    try:
        while calls and not tasks:
            calls.pop()()
        while following < len(tasks):
            for place, slot in enumerate(slots):
                if slot.ready and waiting and waiting[0][0] < following + window:
                    near = [entry for entry in waiting[:window] if entry[0] < following + window]
                    index, task = max(near, key=lambda entry: size(entry[1]))  # the first of equals
                    waiting.remove((index, task))
                    running[place] = index, task, time.monotonic()
                    try:
                        slot.send(broadcast, task, kept(task.client_id))
                    except EOFError as error:  # it died while it was idle: that is not the client's fault
                        del running[place]
                        bisect.insort(waiting, (index, task), key=lambda entry: entry[0])
                        lose(place, str(error))
            while calls:
                calls.pop()()
            due = [given + timeout - time.monotonic() for *_, given in running.values()] if timeout else []
            due += [since + start_timeout - time.monotonic() for since in starting.values()] if start_timeout else []
            busy = [slot for place, slot in enumerate(slots) if place in running or not slot.ready]
            for slot in wait(busy, max(0.0, min(due)) if due else None):
                place = slots.index(slot)
                try:
                    outcome = slot.receive()
                except EOFError as error:
                    lose(place, str(error))
                    continue
                starting.pop(place, None)
                if outcome is not None and place in running:
                    failed_starts = 0
                    done[running.pop(place)[0]] = outcome
            for place, (*_, given) in list(running.items()):
                if timeout and time.monotonic() >= given + timeout:
                    lose(place, f"nothing came back within {timeout:g} s")
            for place, since in list(starting.items()):
                if start_timeout and time.monotonic() >= since + start_timeout:
                    lose(place, f"its worker did not start within {start_timeout:g} s")
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for place in running:  # the generator was closed early
            slots[place].restart()
