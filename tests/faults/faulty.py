"""Algorithms, data modules and executors that misbehave, each in one way, and a network small enough for many runs.

The program makes algorithms and data modules from import paths, and clients train on copies of the module, so a test cannot
tell an instance whom to strike, and how: it replaces ``plan``.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, FederatedModule
from fedamm_pl.data.client import Batch, BatchLoader, ClientData
from fedamm_pl.federation.executors import Executor, Runner, RunSpec
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientResult, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession, ServerSession

SERVER = -1
CPU = TrainerConfig(accelerator="cpu").resolved()


def raising(error: BaseException) -> Callable[[], None]:
    """A function that raises this."""

    def act() -> None:
        raise error

    return act


INJECTED = raising(RuntimeError("injected"))


@dataclass
class Plan:
    """Whom the faults below strike, and what they do.

    Attributes:
        strikes: (round, client) -> whether; the client is SERVER for the server's own update.
        act: What happens then; it raises, or never returns.
        spoil: What becomes of a payload or of the server's state then, instead.
    """

    strikes: Callable[[int, int], bool] = lambda round_num, client: False
    act: Callable[[], None] = INJECTED
    spoil: Callable[[State, State], State] = lambda payload, sent: payload


plan = Plan()


def network(num_classes: int, in_channels: int) -> nn.Sequential:
    """Two layers with BatchNorm between them, for images of any size."""
    layers = {
        "pool": nn.AdaptiveAvgPool2d(8),  # 8x8 images are left as they are
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(in_channels * 64, 8),
        "norm": nn.BatchNorm1d(8),
        "relu": nn.ReLU(),
        "classifier": nn.Linear(8, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


# Algorithms


class Strikable(FederatedModule):
    """Can be struck as the client that trains."""

    @property
    def client_session(self) -> ClientSession:
        assert self.session is not None
        return self.session

    @property
    def struck(self) -> bool:
        """Whether it is this client's turn."""
        session = self.client_session
        return plan.strikes(session.broadcast.round_num, session.task.client_id)

    def strike(self) -> None:
        """Act, if it is this client's turn."""
        if self.struck:
            plan.act()


class FailsInTrainingStep(Strikable, FedAMM):
    """A client fails at its third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.strike()
        super().training_step(batch, batch_idx)


class FedAvgFailsInTrainingStep(Strikable, FedAvg):
    """A client fails at its third batch, under automatic optimisation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.strike()
        return super().training_step(batch, batch_idx)


class FailsInTheVirtualStep(Strikable, FedAMM):
    """A client fails within its virtual step; under the synchronous update within that of its third batch."""

    def _virtual_step(self, support: Batch) -> State:
        def fail(*_: Any) -> None:
            if not self.asks_in_fit or self._local_step == fatal_step(self):
                self.strike()

        handle = self.weight_net.register_forward_pre_hook(fail)
        try:
            return super()._virtual_step(support)
        finally:
            handle.remove()


class FailsToAnswer(FedAMM):
    """The server raises instead of an answer; under the synchronous update at the client's third question."""

    def answer(self, question: Question, server: ServerSession) -> Answer:
        if question.step == fatal_step(self) and plan.strikes(question.round_num, question.client_id):
            plan.act()
        return super().answer(question, server)


class AnswersTooLittle(FedAMM):
    """The server's answer lacks an entry, so that the client fails after its virtual step."""

    def answer(self, question: Question, server: ServerSession) -> Answer:
        answer = super().answer(question, server)
        if question.step == fatal_step(self) and plan.strikes(question.round_num, question.client_id):
            answer.payload.pop(min(answer.payload))
        return answer


class FailsAtTheEndOfTraining(Strikable, FedAMM):
    """A client fails after its last epoch."""

    def on_train_end(self) -> None:
        self.strike()


class FailsInPayload(Strikable, FedAMM):
    """A client fails when it puts its result together."""

    def client_payload(self) -> State:
        self.strike()
        return super().client_payload()


class SpoilsPayload(Strikable, FedAMM):
    """A client returns something else than it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        return plan.spoil(payload, self.client_session.payload) if self.struck else payload


class FedAvgSpoilsPayload(Strikable, FedAvg):
    """A client returns something else than it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        return plan.spoil(payload, self.client_session.payload) if self.struck else payload


class SpoilsTheServer(FedAvg):
    """The server's own update goes wrong."""

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        updated = super().server_update(state, results, server)
        return plan.spoil(updated, state) if plan.strikes(server.round_num, SERVER) else updated


class LivePayload(FedAvg):
    """A client returns its own parameters instead of copies of them."""

    def client_payload(self) -> State:
        return {name: value for name, value in self.state_dict().items() if name.startswith(self.shared)}


class PayloadWithGraph(FedAvg):
    """A client returns parameters from which gradients could flow."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        return {name: value.requires_grad_(value.is_floating_point()) for name, value in payload.items()}


class WritesOnWhatItReceived(Strikable, FedAvg):
    """A client changes in place what it was sent, after it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        for value in self.client_session.payload.values():
            value.add_(100)
        return payload


def fatal_step(module: FedAMM) -> int:
    """The local step at which a meta step fails."""
    return 2 if module.hparams["meta_update"] == "synchronous" else 0


# Data


class FailsOnce(FederatedDataModule):
    """Gives each client that the plan strikes in round 1 unsound data, the first time that they are opened."""

    def client(self, client_id: int) -> ClientData:
        opened: set[int] = self.__dict__.setdefault("_opened", set())
        data = super().client(client_id)
        if client_id in opened or not plan.strikes(1, client_id):
            return data
        opened.add(client_id)
        return self.unsound(data)

    def unsound(self, data: ClientData) -> ClientData:
        return data


class UnreadableData(FailsOnce):
    """The data of a client cannot be opened."""

    def unsound(self, data: ClientData) -> ClientData:
        plan.act()
        return data


class BrokenBatches(FailsOnce):
    """The third batch of a client cannot be made."""

    def unsound(self, data: ClientData) -> ClientData:
        return _BrokenBatches(**vars(data))


class _BrokenBatches(ClientData):
    def train_loader(self, seed: int) -> Any:
        return _BrokenLoader(super().train_loader(seed))


@dataclass
class _BrokenLoader:
    loader: BatchLoader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self.loader):
            if step == 2:
                plan.act()
            yield batch


class NoSupport(FailsOnce):
    """The support set of a client cannot be drawn."""

    def unsound(self, data: ClientData) -> ClientData:
        return _NoSupport(**vars(data))


class _NoSupport(ClientData):
    def support(self, seed: int) -> Batch:
        plan.act()
        return super().support(seed)


class UnknownClasses(FailsOnce):
    """The labels of a client are of classes that the network does not have."""

    def unsound(self, data: ClientData) -> ClientData:
        return ClientData(**{**vars(data), "labels": data.labels + 1000})


# Executors


class Returning(Executor):
    """Trains nobody and returns what it was made with, whatever it is asked.

    Args:
        outcomes: What to return in each round.
    """

    def __init__(self, outcomes: Iterable[Any]) -> None:
        self.outcomes = list(outcomes)

    def open(self, spec: RunSpec) -> Runner:
        return _Returning(self.outcomes, spec)


class _Returning(Runner):
    def __init__(self, outcomes: Sequence[Any], spec: RunSpec) -> None:
        self.outcomes = outcomes
        self.environment = {"content_hash": spec.data.content_hash, "threads": torch.get_num_threads()}

    def run(self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Any) -> Iterator[Any]:
        yield from self.outcomes
