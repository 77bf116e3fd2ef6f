"""``Worker``: a module, data and a server of its own; trains one client at a time, in whatever process it is."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from fedamm_pl.federation.client import attempt
from fedamm_pl.federation.executors.base import Outcome, RunSpec
from fedamm_pl.federation.fingerprint import hashes, versions
from fedamm_pl.federation.server import Server
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession


class Worker:
    """Trains clients, each by a fresh quiet Trainer on one resident module.

    Args:
        spec: What module and data are built from.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.module = spec.build_module()
        spec.trainer.place(self.module)
        spec.data.to(spec.trainer.device)
        self._broadcast: Broadcast | None = None
        self._answering: Broadcast | None = None

    @property
    def environment(self) -> dict[str, Any]:
        """What it computes with."""
        return {
            **hashes(self.spec.data),
            "device": self.spec.trainer.kind,
            "threads": torch.get_num_threads(),
            **versions(),
        }

    def begin(self, broadcast: Broadcast) -> None:
        """Take up a round."""
        self._broadcast = broadcast

    def train(self, task: ClientTask, kept: State) -> Outcome:
        """Train a client of the round."""
        return attempt(self.module, self.session(task, kept), self.spec.trainer)

    def session(self, task: ClientTask, kept: State) -> ClientSession:
        """Return what a client of the round has in it."""
        assert self._broadcast is not None
        return ClientSession(self._broadcast, task, self.spec.data.client, self.answer, kept)

    @cached_property
    def server(self) -> Server:
        """What answers its clients, equal to the run's own."""
        return Server(self.spec.build_module(), self.spec.data, self.spec.trainer, self.spec.seed)

    def answer(self, question: Question) -> Answer:
        """Answer a client of the round."""
        self._begin_to_answer()
        return self.server.answer(question)

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer several clients of the round at once, by a method that can."""
        self._begin_to_answer()
        return self.server.answers(questions)

    def _begin_to_answer(self) -> None:
        if self._answering is not self._broadcast:
            assert self._broadcast is not None
            self.server.begin(self._broadcast)
            self._answering = self._broadcast
