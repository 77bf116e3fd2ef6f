"""One round as a module sees it: ``ClientSession`` on a client, ``ServerSession`` at the server."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.federation.aggregation import Aggregate
from fedamm_pl.protocol.messages import Answer, ClientTask, Question, State, payload_bytes

Stage = Literal["data", "training", "meta step"]


class ClientSession:
    """Task, data, and a line to the server that counts bytes; knows at which stage the client is, and for how long.

    ``kept`` is what the client keeps to itself from one of its rounds to the next, empty at first: assign to it during the fit.

    Args:
        task: What the server asks.
        client_data: Client id -> its data; called when the data are first used.
        answer: The server.
    """

    def __init__(
        self, task: ClientTask, client_data: Callable[[int], ClientData], answer: Callable[[Question], Answer]
    ) -> None:
        self.task = task
        self.stage: Stage = "training"
        self.seconds: dict[Stage, float] = {"data": 0.0, "training": 0.0, "meta step": 0.0}
        self.bytes_received = payload_bytes(task.payload)
        self.bytes_sent = 0
        self.kept: State = dict(task.kept)
        self._client_data = client_data
        self._answer = answer

    @contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
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

    def train_loader(self) -> "WatchedLoader":
        """Return the training batches of the round."""
        return WatchedLoader(self.data.train_loader(self.task.seed), self)

    def support(self) -> Batch:
        """Draw the support batch of the round."""
        data = self.data
        with self.during("data"):
            return data.support(self.task.seed)

    def ask(self, step: int, payload: State) -> Answer:
        """Send a question at a local step and return the answer."""
        answer = self._answer(Question(self.task.round_num, self.task.client_id, step, payload))
        self.bytes_sent += payload_bytes(payload)
        self.bytes_received += payload_bytes(answer.payload)
        return answer


@dataclass(frozen=True)
class ServerSession:
    """What the server's hooks may use in one round.

    Attributes:
        round_num: The round.
        num_clients: Number of clients K, in this round or not.
        average: Makes an empty aggregate: how the run averages what clients send, by weight or robustly.
        meta: A number of your choice -> the whole meta set, with the training transform drawn for that number.
    """

    round_num: int
    num_clients: int
    average: Callable[[], Aggregate]
    meta: Callable[[int], Batch]


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
