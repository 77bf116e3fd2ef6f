"""Algorithms, data modules and executors that misbehave, each in one way, and a network small enough for many runs.

The program makes algorithms and data modules from import paths, so a test cannot tell them whom to strike, and how: it
replaces ``plan``.
"""

import multiprocessing
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, FederatedModule
from fedamm_pl.data.client import Batch, BatchLoader, ClientData
from fedamm_pl.federation.executors import SequentialExecutor
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import Answer, ClientFailure, ClientResult, ClientTask, Question, State
from fedamm_pl.protocol.session import ServerSession

SERVER = -1
CPU = TrainerConfig(accelerator="cpu")
Outcome = ClientResult | ClientFailure


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


class KnowsItsTask(FederatedModule):
    """Remembers the task of the client that trains, beyond its fit."""

    task: ClientTask

    def on_train_start(self) -> None:
        assert self.session is not None
        self.task = self.session.task
        super().on_train_start()

    def strike(self) -> None:
        """Act, if it is this client's turn."""
        if plan.strikes(self.task.round_num, self.task.client_id):
            plan.act()


class FailsInTrainingStep(KnowsItsTask, FedAMM):
    """A client fails at its third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.strike()
        super().training_step(batch, batch_idx)


class FedAvgFailsInTrainingStep(KnowsItsTask, FedAvg):
    """A client fails at its third batch, under automatic optimisation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            self.strike()
        return super().training_step(batch, batch_idx)


class FailsInTheVirtualStep(KnowsItsTask, FedAMM):
    """A client fails within its virtual step; under the synchronous update within that of its third batch."""

    def _meta_step(self, support: Batch, meta: Batch | None) -> None:
        def fail(*_: Any) -> None:
            if self._local_step == fatal_step(self):
                self.strike()

        handle = self.weight_net.register_forward_pre_hook(fail)
        try:
            super()._meta_step(support, meta)
        finally:
            handle.remove()


class FailsToAnswer(KnowsItsTask, FedAMM):
    """The server raises instead of an answer; under the synchronous update at the client's third question."""

    def answer(self, question: Question, meta: Batch) -> Answer:
        if question.step == fatal_step(self) and plan.strikes(question.round_num, question.client_id):
            plan.act()
        return super().answer(question, meta)


class AnswersTooLittle(KnowsItsTask, FedAMM):
    """The server's answer lacks an entry, so that the client fails after its virtual step."""

    def answer(self, question: Question, meta: Batch) -> Answer:
        answer = super().answer(question, meta)
        if question.step == fatal_step(self) and plan.strikes(question.round_num, question.client_id):
            answer.payload.pop(min(answer.payload))
        return answer


class FailsAtTheEndOfTraining(KnowsItsTask, FedAMM):
    """A client fails after its last epoch."""

    def on_train_end(self) -> None:
        self.strike()


class FailsInPayload(KnowsItsTask, FedAMM):
    """A client fails when it puts its result together."""

    def client_payload(self) -> State:
        self.strike()
        return super().client_payload()


class SpoilsPayload(KnowsItsTask, FedAMM):
    """A client returns something else than it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        if plan.strikes(self.task.round_num, self.task.client_id):
            return plan.spoil(payload, self.task.payload)
        return payload


class FedAvgSpoilsPayload(KnowsItsTask, FedAvg):
    """A client returns something else than it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        if plan.strikes(self.task.round_num, self.task.client_id):
            return plan.spoil(payload, self.task.payload)
        return payload


class SpoilsTheServer(KnowsItsTask, FedAvg):
    """The server's own update goes wrong."""

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        updated = super().server_update(state, results, server)
        return plan.spoil(updated, state) if plan.strikes(self.task.round_num, SERVER) else updated


class LivePayload(FedAvg):
    """A client returns its own parameters instead of copies of them."""

    def client_payload(self) -> State:
        return {name: value for name, value in self.state_dict().items() if name.startswith(self.shared)}


class PayloadWithGraph(FedAvg):
    """A client returns parameters from which gradients could flow."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        return {name: value.requires_grad_(value.is_floating_point()) for name, value in payload.items()}


class WritesOnItsTask(KnowsItsTask, FedAvg):
    """A client changes in place what it was sent, after it has trained."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        for value in self.task.payload.values():
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


class Returning:
    """Trains nobody and returns what it was made with, whatever it is asked.

    Args:
        outcomes: What to return in each round.
    """

    can_time_out = True

    def __init__(self, outcomes: Iterable[Any]) -> None:
        self.outcomes = list(outcomes)

    def run(self, *_: Any) -> Iterator[Any]:
        yield from self.outcomes


class ForkingExecutor:
    """Trains each client in a process of its own, forked for it, and kills the process when its time is over."""

    can_time_out = True

    def run(
        self,
        module: FederatedModule,
        client_data: Callable[[int], ClientData],
        tasks: Iterable[ClientTask],
        answer: Callable[[Question], Answer],
    ) -> Iterator[Outcome]:
        context = multiprocessing.get_context("fork")
        for task in tasks:
            here, there = context.Pipe()
            process = context.Process(target=_train, args=(module, client_data, task, here, there))
            process.start()
            there.close()  # so that the end of the process is the end of what comes from here
            try:
                yield self._outcome(task, here, process, answer)
            finally:
                process.kill()
                process.join()
                here.close()

    @staticmethod
    def _outcome(task: ClientTask, line: Connection, process: Any, answer: Callable[[Question], Answer]) -> Outcome:
        end = None if task.timeout is None else time.monotonic() + task.timeout
        while line.poll(None if end is None else max(end - time.monotonic(), 0)):
            try:
                message = pickle.loads(line.recv_bytes())
            except EOFError:
                process.join()
                return ClientFailure(task.client_id, "training", f"its process ended with status {process.exitcode}")
            if not isinstance(message, Question):
                return message
            try:
                reply: Answer | str = answer(message)
            except Exception as error:
                reply = str(error)
            line.send_bytes(pickle.dumps(reply))
        return ClientFailure(task.client_id, "timeout", f"no result after {task.timeout:g} s")


def _train(
    module: FederatedModule, client_data: Callable[[int], ClientData], task: ClientTask, here: Any, there: Any
) -> None:
    """The process of a client."""
    here.close()

    # plain pickles: what multiprocessing would send are handles of memory that dies with this process
    def ask(question: Question) -> Answer:
        there.send_bytes(pickle.dumps(question))
        reply = pickle.loads(there.recv_bytes())
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return reply

    (outcome,) = SequentialExecutor(CPU).run(module, client_data, [task], ask)
    there.send_bytes(pickle.dumps(outcome))
