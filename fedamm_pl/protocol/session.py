"""A round as seen by a module: ``ClientSession`` at a client, ``ServerSession`` at the server."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientResult, ClientTask, Question, State, payload_bytes

ClientStage = Literal["data", "training", "meta step"]


class ClientSession:
    """What a client has in a round: broadcast, task, data, and a connection to the server that counts bytes.

    It records the client's current stage and how long each stage takes.

    Args:
        broadcast: What the server sent to all.
        task: Which client this is.
        client_data: Client id -> its data; called when the data are first used.
        ask: Puts a question to the server.
        kept: The client's private state from its last round.

    Attributes:
        payload: The received state; the client's own copy.
        kept: The client's private state between its rounds, empty at first: assign to it during the fit.
        surveyed: What :meth:`~fedamm_pl.protocol.module.FederatedModule.survey` returned before the fit.
        answer: The answer to the question before the fit; None if there was none.
        metrics: Means over the last local epoch, for the result.
        num_steps: Number of steps of the fit, once it has ended.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        task: ClientTask,
        client_data: Callable[[int], ClientData],
        ask: Callable[[Question], Answer],
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.broadcast = broadcast
        self.task = task
        self.payload: State = {name: value.clone() for name, value in broadcast.payload.items()}  # it may write on it
        self.kept: State = dict(kept or {})
        self.surveyed: State = {}
        self.answer: Answer | None = None
        self.metrics: dict[str, torch.Tensor | float] = {}
        self.num_steps = 0
        self.stage: ClientStage = "training"
        self.seconds: dict[ClientStage, float] = {"data": 0.0, "training": 0.0, "meta step": 0.0}
        self.bytes_received = payload_bytes(self.payload)
        self.bytes_sent = 0
        self._client_data = client_data
        self._ask = ask

    @contextmanager
    def during(self, stage: ClientStage) -> Iterator[None]:
        """Time a stage. If it raises, the session stays at it, so that the failure can be named."""
        outer, self.stage, start = self.stage, stage, time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start
        self.stage = outer

    @cached_property
    def data(self) -> ClientData:
        """The client's data."""
        with self.during("data"):
            return self._client_data(self.task.client_id)

    def train_loader(self, data: ClientData) -> "WatchedLoader":
        """Return the training batches of the round.

        Args:
            data: What the client trains on.
        """
        # a proxy: Lightning's dead Trainer holds the loader until it is collected, and would hold the models of this session
        return WatchedLoader(data.train_loader(self.task.seed), weakref.proxy(self))

    def support(self) -> Batch:
        """Draw the support batch of the round; the same each time."""
        data = self.data
        with self.during("data"):
            return data.support(self.task.seed)

    def ask(self, step: int, payload: State) -> Answer:
        """Send a question at a local step and return the answer."""
        question = self.question(step, payload)
        answer = self._ask(question)
        self.count(question, answer)
        return answer

    def question(self, step: int, payload: State) -> Question:
        """Return what :meth:`ask` sends; to whoever sends the questions of several clients at once."""
        return Question(self.broadcast.round_num, self.task.client_id, step, payload)

    def count(self, question: Question, answer: Answer) -> None:
        """Count the bytes of a question and of its answer."""
        self.bytes_sent += payload_bytes(question.payload)
        self.bytes_received += payload_bytes(answer.payload)


@dataclass
class ServerSession:
    """What the server's hooks may use in one round.

    Attributes:
        round_num: The round.
        num_clients: Number of all clients K.
        local_epochs: Number E of local epochs.
        meta: Any number -> the entire meta set, with a draw of the training transform for that number.
        meta_for: A question -> the entire meta set, with a draw of the training transform for that question.
        generator: A purpose in words -> a generator for the server's draws, a function of (seed, round, purpose).
        reduce: The results of a round -> their payloads reduced as ``shared`` and ``returned`` say.
        optimize: The server's last state, and the averaged shared entries -> these after the step of the run's server optimizer,
            with what it remembers; without one, as here, the average.
        state: The server's state at the start of the round.
        sent: What was broadcast in it.
        num_results: How many results have been reduced.
    """

    round_num: int
    num_clients: int
    local_epochs: int
    meta: Callable[[int], Batch]
    meta_for: Callable[[Question], Batch]
    generator: Callable[[str], torch.Generator]
    reduce: Callable[[Iterable[ClientResult]], State]
    optimize: Callable[[State, State], State] = lambda state, average: average
    state: State = field(default_factory=dict)
    sent: State = field(default_factory=dict)
    num_results: int = 0


class WatchedLoader:
    """Batches whose making counts as the stage ``data`` of a session.

    Args:
        loader: Iterable of batches with a length.
        session: Whose stage it is.
    """

    def __init__(self, loader: Iterable[Batch], session: ClientSession) -> None:
        self.loader = loader
        self.session = session

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        with self.session.during("data"):
            batches = iter(self.loader)
        while True:
            with self.session.during("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
