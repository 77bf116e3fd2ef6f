"""A round as a module sees it: ``ClientSession`` at a client, ``ServerSession`` at the server."""

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
    """The round of one client: broadcast, task, data, and a connection to the server that counts bytes.

    It records the client's current stage and how long each stage takes.

    Args:
        broadcast: The message that the server sent to all clients.
        task: The task, which names the client.
        client_data: Client id -> its data; called when the data are first used.
        ask: Sends a question to the server and returns the answer.
        kept: The client's private state from its last round.

    Attributes:
        payload: The received state; the client's own copy.
        kept: The client's private state between its rounds, empty at first; assign to it during the fit.
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
        self.payload: State = {
            name: value.clone() for name, value in broadcast.payload.items()
        }  # the client may change it
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
        """Time a stage. If the stage raises an error, the session stays in it, so that the failure can name it."""
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
            data: The data on which the client trains.
        """
        # a proxy: a finished Trainer keeps the loader until it is collected, and would keep the models of this session
        return WatchedLoader(data.train_loader(self.task.seed), weakref.proxy(self))

    def support(self) -> Batch:
        """Draw the support batch of the round; every call returns the same batch."""
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
        """Return the question that :meth:`ask` sends; for callers that send those of several clients at once."""
        return Question(self.broadcast.round_num, self.task.client_id, step, payload)

    def count(self, question: Question, answer: Answer) -> None:
        """Add the bytes of a question and of its answer to the session's counts."""
        self.bytes_sent += payload_bytes(question.payload)
        self.bytes_received += payload_bytes(answer.payload)


@dataclass
class ServerSession:
    """Data and functions for the server's hooks in one round.

    Attributes:
        round_num: The round.
        num_clients: Number of all clients K.
        local_epochs: Number E of local epochs.
        meta: Any number -> the entire meta set, with a draw of the training transform for that number.
        meta_for: A question -> the entire meta set, with a draw of the training transform for that question.
        generator: A purpose in words -> a generator for the server's draws, a function of (seed, round, purpose).
        reduce: The results of a round -> their payloads, reduced as ``shared`` and ``returned`` declare.
        optimize: The server's last state and the averaged shared entries -> the shared entries after the step of the
            run's server optimizer, and the optimizer's state; the default, without an optimizer, returns the average.
        state: The server's state at the start of the round.
        sent: The payload broadcast in the round.
        num_results: Number of results that have been reduced.
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
    """Batches whose loading is timed as the stage ``data`` of a session.

    Args:
        loader: Iterable of batches with a length.
        session: The session.
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
