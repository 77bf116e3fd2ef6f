"""``Processes``: trains clients in several processes on this machine."""

import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any

from fedamm_pl.federation.executors.base import Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.pool import STARTING, Pool, PoolRunner, PoolSlot
from fedamm_pl.federation.executors.slots import Slot
from fedamm_pl.federation.executors.worker import begun, started, trained, unreadable
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.codec import encode, pack
from fedamm_pl.protocol.messages import Broadcast, ClientTask, State

CONTEXT = get_context("spawn")  # forking a process that uses threads or a GPU does not work
CLOSING = 5.0
"""Time limit in seconds for an idle worker to end by itself."""
MESSAGE_MODELS, MESSAGE_ROOM = 20, 2**31
"""Size limit of a result: this many times the size of the broadcast, plus this many bytes. Larger ones are not read."""
ROUND, CLIENT = b"round", b"client"
"""Announce the next messages to a worker: a broadcast, or a task and the private state of its client."""


class Processes(Pool):
    """Trains clients in several processes on this machine, on several cores or GPUs.

    Each process loads the data itself. A process that dies, or whose client exceeds its time limit, is replaced, and the client is trained
    again. With the same number of threads per client the results equal those of training one client after the other, bit for bit.

    In your own script, the code that starts the run must be inside ``if __name__ == "__main__":``.

    Args:
        num_workers: Number of processes; with several GPUs they are assigned in turn.
        threads_per_worker: Threads per process; by default the threads of the main process, up to the number of cores, divided equally.
        client_timeout: Time limit per client in seconds; null for none.
        max_retries: How often a client is trained again after its process died or its time was up.

    Raises:
        ValueError: If an option is out of range.
    """

    def open(self, spec: RunSpec) -> Runner:
        """Start the processes and wait until each has its module and its data."""
        return ProcessRunner(self, self.for_workers(spec))


class ProcessRunner(PoolRunner):
    """Runner of :class:`Processes`.

    Args:
        options: The executor: number of processes, time limit and retries.
        spec: What the processes build module and data from.

    Raises:
        ValueError: If they cannot be started, or do not see the same data.
    """

    _slots: list["ProcessSlot"]  # type: ignore[assignment]

    def __init__(self, options: Processes, spec: RunSpec) -> None:
        super().__init__(options, spec, lambda content, place: ProcessSlot(content, place), _wait)

    def close(self) -> None:
        """End the processes."""
        for slot in self._slots:
            slot.closed = True
            slot.pipe.close()  # an idle process then ends by itself
        for slot in self._slots:
            slot.end(CLOSING if slot.ready else 0.0)
        self._slots = []


class ProcessSlot(PoolSlot):
    """A slot whose worker is a process at the other end of a pipe.

    Args:
        spec: A pickled :class:`RunSpec`.
        place: Number of the slot.
    """

    def __init__(self, spec: bytes, place: int) -> None:
        super().__init__(place)
        self._spec = spec
        self.closed = False
        self._start()

    def _start(self) -> None:
        self.ready = False
        self._sent: Broadcast | None = None
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(self._spec, self.place, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that reading raises EOFError once the process has ended

    def started(self) -> dict[str, Any]:
        """Wait for the process and return its environment, see :class:`PoolSlot`."""
        try:
            if not self.pipe.poll(STARTING):
                raise ValueError(f"Expected {self.name} to start within {STARTING:g} s, got one that is still loading.")
            content = self.pipe.recv_bytes(2**20)
        except (EOFError, OSError) as error:
            raise ValueError(
                f"Expected {self.name} to start, got one that ended ({self._end()}). A script that trains in "
                'several processes must start the run below `if __name__ == "__main__":`.'
            ) from error
        return self.environment_in(content)

    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        """Give the worker a client, see :class:`Slot`."""
        self.ready = False
        try:
            if self._sent is not broadcast:
                content = encode(broadcast)
                self.pipe.send_bytes(ROUND)
                self.pipe.send_bytes(content)
                self._sent = broadcast
                self._most = MESSAGE_MODELS * len(content) + MESSAGE_ROOM
            self.pipe.send_bytes(CLIENT)
            self.pipe.send_bytes(encode(task))
            self.pipe.send_bytes(pack(kept))
        except OSError as error:
            raise EOFError(self._end()) from error

    def receive(self) -> Outcome | None:
        """Return what the worker has sent, see :class:`Slot`."""
        if self._sent is None:
            try:
                self.started()
            except ValueError as error:
                raise EOFError(str(error)) from error
            return None
        try:
            content = self.pipe.recv_bytes(self._most)
        except (EOFError, OSError) as error:
            too_long = not self.pipe.readable  # a longer message is not read and closes this direction of the pipe
            raise EOFError(f"its worker sent more than {self._most} bytes" if too_long else self._end()) from error
        return self.outcome_in(content)

    def restart(self) -> None:
        """End the process and start another one.

        Once the runner is closed this does nothing: a round that was dropped may be cancelled after that.
        """
        if self.closed:
            return
        self.pipe.close()
        self.end(0.0)
        self._start()

    def end(self, seconds: float) -> None:
        """Give the process some seconds to end by itself, then kill it."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()

    def _end(self) -> str:
        self.process.join(CLOSING)
        code = self.process.exitcode
        how = "alive" if code is None else f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return f"its worker died, {how}"


def _wait(slots: Sequence[Slot], seconds: float | None) -> Sequence[Slot]:
    """Return the slots whose process has sent something or has ended, once there is one."""
    by_handle: dict[Any, Slot] = {}
    for slot in slots:
        assert isinstance(slot, ProcessSlot)
        by_handle |= {slot.pipe: slot, slot.process.sentinel: slot}
    found = connection.wait(list(by_handle), seconds)
    return list(dict.fromkeys(by_handle[handle] for handle in found))


def work(spec: bytes, place: int, pipe: Connection) -> None:
    """Run a worker process: build module and data, then train the clients that the pipe brings until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    worker, said = started(spec, place)
    pipe.send_bytes(said)
    if worker is None:
        return
    with quiet():
        try:
            while True:
                if pipe.recv_bytes() == ROUND:
                    begun(worker, pipe.recv_bytes())
                else:
                    pipe.send_bytes(trained(worker, pipe.recv_bytes(), pipe.recv_bytes()))
        except (EOFError, OSError):  # the main process has closed the pipe or ended
            return
        except ValueError as error:
            with suppress(OSError):
                pipe.send_bytes(unreadable(error))
