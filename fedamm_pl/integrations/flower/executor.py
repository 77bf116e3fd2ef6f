"""``Flower``: an executor for clients on the nodes of a Flower federation, each on its own machine."""

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from flwr.app import Message

from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.fingerprint import hashes, versions
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.soundness import check_question
from fedamm_pl.integrations.flower.nodes import POLL, Nodes
from fedamm_pl.integrations.flower.wire import (
    AGAIN,
    ANSWER,
    BEGIN,
    BROADCAST,
    ERROR,
    FINISH,
    KEPT,
    LOST,
    OUTCOME,
    ROUND,
    RUN,
    TASK,
    bytes_part,
    plain_part,
    record,
)
from fedamm_pl.protocol.codec import decode, encode, pack
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, Question
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)
GREETING = 5.0
"""Seconds between checks for nodes that have joined or left during a round."""
MESSAGE_MODELS, MESSAGE_ROOM = 20, 2**26
"""The largest size of a reply is this multiple of the broadcast, plus this number of bytes."""


class Flower(Executor):
    """Trains clients on nodes of a Flower federation.

    Each message starts a new process at the client, so a client cannot ask the server during local training; a method
    that asks before the fit needs two messages. A client whose process dies is asked again, with the same seed. A
    client that is not connected, or does not answer in time, is lost for the round.

    Args:
        nodes: Who they are.
        client_timeout: Seconds for each message to a client and its answer. A process that dies is noticed by Flower after about 75.
        max_retries: How often a client is asked again whose process or node died.
        rejoin_timeout: Seconds that a node which was lost in a round has to come back in it.
        run_name: Under which clients file what they keep.
        window: How many clients may be at work at once: as many models are in flight.

    Raises:
        ValueError: If an option is out of range.
    """

    can_ask: ClassVar[bool] = False

    def __init__(
        self,
        nodes: Nodes,
        client_timeout: float,
        max_retries: int,
        rejoin_timeout: float,
        run_name: str,
        window: int,
    ) -> None:
        if not 0 < client_timeout < math.inf:
            raise ValueError(f"Expected `client-timeout` to be a number above 0, got {client_timeout}.")
        limits = (("max-retries", max_retries, 0), ("rejoin-timeout", rejoin_timeout, 0), ("window", window, 1))
        for name, value, least in limits:
            if value < least:
                raise ValueError(f"Expected `{name}` to be {least} or more, got {value}.")
        self.nodes = nodes
        self.client_timeout = client_timeout
        self.max_retries = max_retries
        self.rejoin_timeout = rejoin_timeout
        self.run_name = hashlib.sha256(run_name.encode()).hexdigest()[:16]
        self.window = window

    @property
    def workers_here(self) -> int:
        """0, since all clients run on other machines."""
        return 0

    def open(self, spec: RunSpec) -> Runner:
        """Return the runner; the nodes have already joined.

        Raises:
            ValueError: If the method's server needs the class counts of clients that have not reported them.
        """
        runner = FlowerRunner(self, spec)
        if not spec.data.knows_class_counts:
            server = runner.server
            try:
                server.broadcast(server.module.shared_state(), 1, 1)
            except ValueError as error:
                if "class_counts" not in str(error):
                    raise
                raise ValueError(
                    f"Expected `class-counts` to be true for {type(server.module).__name__}, whose server needs the class counts of all "
                    "clients together, got false."
                ) from error
        return runner


@dataclasses.dataclass
class Flight:
    """A message that a client has not yet answered.

    Attributes:
        place: Index of the task in the round.
        task: Task of the client.
        due: Time at which the client is given up.
        answered: Whether a question of the client has been answered.
    """

    place: int
    task: ClientTask
    due: float
    answered: bool = False


class FlowerRunner(Runner):
    """Runner of :class:`Flower`.

    Args:
        options: Nodes and limits.
        spec: Specification of the run; the server's module, which answers questions, is built from it.
    """

    keeps_here = False

    def __init__(self, options: Flower, spec: RunSpec) -> None:
        self.options, self.nodes, self.grid = options, options.nodes, options.nodes.grid
        self.names = spec.data.client_names
        self.server = Server(spec.build_module(), spec.data, spec.trainer, spec.seed)
        self.environment = {**hashes(spec.data), "device": spec.trainer.kind, "threads": spec.threads, **versions()}
        self._flying: dict[str, Flight] = {}

    @property
    def busy(self) -> tuple[int, int]:
        """Number of clients that are training, and number of connected clients."""
        return len(self._flying), len(self.nodes.node_of)

    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task; see :class:`Runner`."""
        self.nodes.greet()
        return _Round(self, broadcast, tasks, kept, meanwhile).outcomes()


class _Round:
    """A round, from its broadcast to the last outcome."""

    def __init__(
        self,
        runner: FlowerRunner,
        broadcast: Broadcast,
        tasks: Sequence[ClientTask],
        kept: Kept,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        self.runner, self.broadcast, self.kept = runner, broadcast, kept
        self.calls = [meanwhile] if meanwhile else []
        self.content = encode(broadcast)
        self.most = MESSAGE_MODELS * len(self.content) + MESSAGE_ROOM
        self.num_tasks = len(tasks)
        self.waiting = list(enumerate(tasks))
        self.flying: dict[str, Flight] = {}
        self.done: dict[int, Outcome] = {}
        self.attempts: dict[int, int] = {}
        self.away: list[tuple[Flight, str]] = []  # lost clients, and why; due: when the node must be back
        self._begun = False
        self._greeted = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the tasks."""
        following, window = 0, self.runner.options.window
        self.runner._flying = self.flying
        try:
            while following < self.num_tasks or self.calls:
                while self.waiting and len(self.flying) < window and self.waiting[0][0] < following + 2 * window:
                    self._begin(*self.waiting.pop(0))
                while self.calls:
                    self.calls.pop()()
                if not self._hear():
                    time.sleep(POLL)
                self._give_up_late()
                self._greet()
                self._take_back()
                while following in self.done:
                    yield self.done.pop(following)
                    following += 1
            self.runner.nodes.greet()  # new nodes take part in the next round
        finally:
            for flight in self.flying.values():  # the round was abandoned: their answers are still due
                self.runner.nodes.forget(self._name(flight))
            self.flying.clear()

    def _begin(self, place: int, task: ClientTask) -> None:
        plain = {ROUND: self.broadcast.round_num, TASK: encode(task)}
        parts = {BROADCAST: self.content, KEPT: pack(self.kept(task.client_id))}
        self._send(BEGIN, Flight(place, task, 0.0), plain, parts)

    def _send(self, kind: str, flight: Flight, plain: dict[str, Any], parts: dict[str, bytes]) -> None:
        runner = self.runner
        node = runner.nodes.node_of.get(self._name(flight))
        if node is None:
            self.done[flight.place] = ClientFailure(flight.task.client_id, "lost", "it is not connected")
            return
        flight.due = time.monotonic() + runner.options.client_timeout
        content = record({**runner.nodes.told, **plain, RUN: runner.options.run_name}, **parts)
        message = Message(content, dst_node_id=node, message_type=kind, group_id=str(self.broadcast.round_num))
        sent = next(iter(runner.grid.push_messages([message])), "")
        if sent:
            self.flying[sent] = flight
        else:
            self._lose(flight, "its message was not taken")

    def _hear(self) -> bool:
        """Process the replies that have arrived; return whether there were any."""
        replies = list(self.runner.grid.pull_messages(list(self.flying))) if self.flying else []
        for reply in replies:
            flight = self.flying.pop(reply.metadata.reply_to_message_id, None)
            if flight is None:
                continue
            if reply.has_error():
                reason = f"{line(reply.error.reason or '', 200)} (code {reply.error.code})"
                if reply.error.code in LOST:
                    self._lose(flight, reason)
                else:
                    self.done[flight.place] = ClientFailure(flight.task.client_id, "lost", reason)
                continue
            try:
                self._take(flight, reply)
            except ValueError as error:
                self.done[flight.place] = ClientFailure(flight.task.client_id, "update", line(str(error)))
        return bool(replies)

    def _take(self, flight: Flight, reply: Message) -> None:
        """Process a reply: a result, a failure, or a question, which is answered.

        Raises:
            ValueError: If the reply is anything else, or belongs to another round or client.
        """
        said, client = plain_part(reply.content), flight.task.client_id
        if AGAIN in said:
            self._lose(flight, line(str(said[AGAIN])))
            return
        if ERROR in said:
            self.done[flight.place] = ClientFailure(client, "data", line(str(said[ERROR])))
            return
        if said.get(ROUND) != self.broadcast.round_num:
            raise ValueError(f"it answers round {line(str(said.get(ROUND)), 40)}, not {self.broadcast.round_num}")
        outcome = decode(bytes_part(reply.content, OUTCOME, self.most))
        if isinstance(outcome, ClientResult | ClientFailure):
            if outcome.client_id != client:
                raise ValueError(f"it answers for client {line(str(outcome.client_id), 40)}")
            self.done[flight.place] = outcome
            return
        if not isinstance(outcome, Question) or flight.answered:
            raise ValueError(f"it sends a {type(outcome).__name__} where a result was asked for")
        check_question(outcome, self.broadcast, client)
        self._answer(flight, outcome)

    def _answer(self, flight: Flight, question: Question) -> None:
        server, task = self.runner.server, flight.task
        if not self._begun:
            server.begin(self.broadcast)
            self._begun = True
        answer = server.answer(question)
        plain = {ROUND: self.broadcast.round_num, TASK: encode(task)}
        parts = {ANSWER: encode(answer), KEPT: pack(self.kept(task.client_id))}
        self._send(FINISH, dataclasses.replace(flight, answered=True), plain, parts)

    def _lose(self, flight: Flight, reason: str) -> None:
        """Schedule another try for a client whose process or node died, or give it up after too many tries."""
        options = self.runner.options
        tries = self.attempts[flight.place] = self.attempts.get(flight.place, 0) + 1
        if tries > options.max_retries:
            self.done[flight.place] = ClientFailure(flight.task.client_id, "lost", reason)
            return
        self.runner.nodes.greet()
        self.away.append((dataclasses.replace(flight, due=time.monotonic() + options.rejoin_timeout), reason))

    def _take_back(self) -> None:
        """Ask lost clients again if their node is connected; give up those that do not return in time."""
        for flight, reason in list(self.away):
            there = self._name(flight) in self.runner.nodes.node_of
            if there:
                name = shown_client(flight.task.client_id, self.runner.names)
                log.warning("round %d: client %s is asked again: %s", self.broadcast.round_num, name, reason)
                self.waiting.insert(0, (flight.place, flight.task))
            elif time.monotonic() > flight.due:
                self.done[flight.place] = ClientFailure(flight.task.client_id, "lost", reason)
            if there or flight.place in self.done:
                self.away.remove((flight, reason))

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for sent, flight in list(self.flying.items()):
            if now > flight.due:
                del self.flying[sent]
                self.runner.nodes.forget(self._name(flight))
                reason = f"nothing came back within {self.runner.options.client_timeout:g} s"
                self.done[flight.place] = ClientFailure(flight.task.client_id, "lost", reason)

    def _greet(self) -> None:
        if time.monotonic() > self._greeted + GREETING:
            self.runner.nodes.greet()
            self._greeted = time.monotonic()

    def _name(self, flight: Flight) -> str:
        return self.runner.names[flight.task.client_id]
