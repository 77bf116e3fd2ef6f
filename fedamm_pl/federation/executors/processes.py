"""Clients in several processes of this machine."""

import json
import logging
import math
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedamm_pl.cores import shared_out
from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.slots import Slot, run_on_slots
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.fingerprint import differences, hashes
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.codec import decode, encode, pack, unpack
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.terminal import line

CONTEXT = get_context("spawn")  # a fork of a process with threads or a GPU does not work
STARTING = 600.0
"""Seconds that a worker has to import the libraries and to load its data."""
CLOSING = 5.0
"""Seconds that an idle worker has to end by itself."""
MESSAGE_MODELS, MESSAGE_ROOM = 20, 2**31
"""A result may be as large as so many times what was broadcast, and so many bytes beside; of a larger one nothing is read."""
NOBODY = -1
"""Stands for the client in the last message of a worker that could not read what it was sent."""


class Processes(Executor):
    """Trains clients in several processes of this machine, on several cores or GPUs.

    Each process loads the data itself. A process that dies, or whose client is out of time, is replaced, and its client is
    trained again. With the same number of threads a client the results are those of one client after the other, bit for bit.

    In a script of your own, what starts the run must stand below ``if __name__ == "__main__":``.

    Args:
        num_workers: Processes; on GPUs they share them in turn.
        threads_per_worker: Threads of each; by default this process's, as far as there are cores, shared out.
        client_timeout: Seconds after which a client is given up; null for none.
        max_retries: How often a client is trained again whose process died or whose time was over.

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

    def open(self, spec: RunSpec) -> Runner:
        """Start the processes and wait until each has its module and its data."""
        threads = self.threads_per_worker or shared_out(spec.threads, self.num_workers)
        return ProcessRunner(self, replace(spec, threads=threads))


class ProcessRunner(Runner):
    """See :class:`Processes`.

    Args:
        options: How many processes, and what to do with the dead.
        spec: What they build module and data from.

    Raises:
        ValueError: If they cannot be started, or do not see the same data.
    """

    def __init__(self, options: Processes, spec: RunSpec) -> None:
        self.options = options
        self._data = spec.data
        content = spec.pickled()
        self._slots: list[ProcessSlot] = []
        try:
            for place in range(options.num_workers):
                self._slots.append(ProcessSlot(content, place))
            environments = [slot.started() for slot in self._slots]
            self.environment = {**environments[0], **hashes(spec.data)}
            for place, environment in enumerate(environments):
                require_same(self.environment, environment, place)
                self._slots[place].environment = self.environment
        except BaseException:
            self.close()
            raise

    def run(self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept) -> Iterator[Outcome]:
        """Train the client of each task, see :class:`Runner`."""
        options = self.options
        return run_on_slots(
            self._slots,
            _wait,
            broadcast,
            tasks,
            kept,
            timeout=options.client_timeout,
            start_timeout=STARTING,
            max_retries=options.max_retries,
            names=self._data.client_names,
        )

    def close(self) -> None:
        """End the processes."""
        for slot in self._slots:
            slot.closed = True
            slot.pipe.close()  # an idle one ends by itself
        for slot in self._slots:
            slot.end(CLOSING if slot.ready else 0.0)
        self._slots = []


class ProcessSlot:
    """A process with a pipe to it.

    Args:
        spec: A pickled :class:`RunSpec`.
        place: Its number.

    Attributes:
        environment: What all workers compute with, once that is known: one that is started anew must do so, too.
    """

    def __init__(self, spec: bytes, place: int) -> None:
        self._spec = spec
        self._place = place
        self.environment: dict[str, Any] | None = None
        self.closed = False
        self._start()

    def _start(self) -> None:
        self.ready = False
        self._sent: Broadcast | None = None
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(self._spec, self._place, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of what comes from it

    def started(self) -> dict[str, Any]:
        """Wait for the process and return its environment.

        Raises:
            ValueError: If it ends before it is ready, says something else, or is not as the other workers are.
        """
        try:
            if not self.pipe.poll(STARTING):
                raise ValueError(
                    f"Expected worker {self._place} to start within {STARTING:g} s, got one that is still loading."
                )
            found = dict(json.loads(self.pipe.recv_bytes(2**20)))
        except (EOFError, OSError) as error:
            raise ValueError(
                f"Expected worker {self._place} to start, got one that ended ({self._end()}). A script that trains in "
                'several processes must start the run below `if __name__ == "__main__":`.'
            ) from error
        except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"Expected worker {self._place} to start, got one that sends something else.") from error
        if "error" in found:
            raise ValueError(f"Expected worker {self._place} to start, got: {line(str(found['error']))}")
        if self.environment is not None:
            require_same(self.environment, found, self._place)
        self.ready = True
        return found

    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        """Give the worker a client, see :class:`Slot`."""
        self.ready = False
        try:
            if self._sent is not broadcast:
                content = encode(broadcast)
                self.pipe.send_bytes(content)
                self._sent = broadcast
                self._most = MESSAGE_MODELS * len(content) + MESSAGE_ROOM
            self.pipe.send_bytes(encode(task))
            self.pipe.send_bytes(pack(kept))
        except OSError as error:
            raise EOFError(self._end()) from error

    def receive(self) -> Outcome | None:
        """Return what has come, see :class:`Slot`."""
        if self._sent is None:
            try:
                self.started()
            except ValueError as error:
                raise EOFError(str(error)) from error
            return None
        try:
            outcome = decode(self.pipe.recv_bytes(self._most))
        except (EOFError, OSError) as error:
            too_long = not self.pipe.readable  # after a message that is longer, of which nothing was read
            raise EOFError(f"its worker sent more than {self._most} bytes" if too_long else self._end()) from error
        except ValueError as error:
            raise EOFError(f"its worker sent what cannot be read: {line(str(error))}") from error
        if not isinstance(outcome, ClientResult | ClientFailure):
            raise EOFError(f"its worker sent a {type(outcome).__name__}, not a result")
        if outcome.client_id == NOBODY and isinstance(outcome, ClientFailure):
            raise EOFError(outcome.reason)
        self.ready = True
        return outcome

    def restart(self) -> None:
        """End the process, and start another one; not after the end, when a round that was dropped is cancelled late."""
        if self.closed:
            return
        self.pipe.close()
        self.end(0.0)
        self._start()

    def end(self, seconds: float) -> None:
        """End the process, if it does not end by itself within some seconds."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()

    def _end(self) -> str:
        self.process.join(CLOSING)
        code = self.process.exitcode
        how = "alive" if code is None else f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return f"its worker died, {how}"


def require_same(expected: dict[str, Any], environment: dict[str, Any], place: int) -> None:
    """Check that a worker sees and uses the same as the others.

    Raises:
        ValueError: If it does not; the message names what differs.
    """
    if found := differences(expected, environment):
        raise ValueError(f"Expected all workers to see and use the same, got worker {place}: {'; '.join(found)}.")


def _wait(slots: Sequence[Slot], seconds: float | None) -> Sequence[Slot]:
    """Wait until something has come from one of the slots, or its process has ended."""
    by_handle: dict[Any, Slot] = {}
    for slot in slots:
        assert isinstance(slot, ProcessSlot)
        by_handle |= {slot.pipe: slot, slot.process.sentinel: slot}
    found = connection.wait(list(by_handle), seconds)
    return list(dict.fromkeys(by_handle[handle] for handle in found))


def work(spec: bytes, place: int, pipe: Connection) -> None:
    """Be a worker: build module and data, then train what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    logging.getLogger("fedamm_pl").setLevel(logging.ERROR)  # the first process has said it
    with quiet():
        try:
            run_spec: RunSpec = pickle.loads(spec)
            torch.set_num_threads(run_spec.threads)
            worker = Worker(replace(run_spec, trainer=_own_device(run_spec.trainer, place)))
            environment = worker.environment
        except Exception as error:
            pipe.send_bytes(json.dumps({"error": " ".join(str(error).split()) or type(error).__name__}).encode())
            return
        try:
            pipe.send_bytes(json.dumps(environment).encode())
            while True:
                message = decode(pipe.recv_bytes())
                if isinstance(message, Broadcast):
                    worker.begin(message)
                elif isinstance(message, ClientTask):
                    pipe.send_bytes(_encoded(worker.train(message, unpack(pipe.recv_bytes())[0])))
        except (EOFError, OSError):  # the other end is gone
            return
        except ValueError as error:  # decode's and unpack's: a client's own errors are its failure
            with suppress(OSError):
                pipe.send_bytes(
                    _encoded(ClientFailure(NOBODY, "lost", f"its worker cannot read what it was sent: {error}"))
                )


def _encoded(outcome: Outcome) -> bytes:
    try:
        return encode(outcome)
    except Exception as error:  # a result of an odd kind may raise anything
        return encode(ClientFailure(outcome.client_id, "update", line(str(error)) or type(error).__name__))


def _own_device(trainer: Any, place: int) -> Any:
    """Share out the GPUs in turn."""
    if trainer.kind != "cuda" or trainer.devices != 1:
        return trainer
    return replace(trainer, devices=[place % torch.cuda.device_count()])
