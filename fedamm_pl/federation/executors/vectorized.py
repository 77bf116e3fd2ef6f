"""``Vectorized``: trains clients in groups, each group in parallel as one program in this process."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fedamm_pl.federation.client import attempt, copied, one_line_reason, prepare, result
from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.isolation import Isolation, undrawn
from fedamm_pl.federation.executors.obstacles import asks_at_once, obstacle
from fedamm_pl.federation.executors.side_by_side import Member, train
from fedamm_pl.federation.executors.trial import check
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed, drawing_from

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Vectorized(Executor):
    """Trains clients in groups, in parallel in one program in this process; fast for many small clients.

    Except for rounding, the results equal those of training one client after the other. It supports methods whose local
    step is plain SGD on an objective of each example, and networks that draw no random numbers during training. Others
    are refused with the reason, as far as a test with two clients on a few batches shows it. Clients that cannot train
    as one program in some round are trained by a Trainer.
    """

    group_size: int = 64
    """Number of clients that train in parallel. Each needs memory for three times its parameters and for its batch."""

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(f"Expected `group_size` to be a whole number of 1 or more, got {self.group_size}.")

    @property
    def together(self) -> int:
        """The group size."""
        return self.group_size

    def open(self, spec: RunSpec) -> Runner:
        """Build the worker, and compare the results of two clients with those of a Trainer.

        Raises:
            ValueError: If the method or the network cannot be trained in parallel.
        """
        if spec.trainer.kind == "cpu" and any(isinstance(part, CONVOLUTIONS) for part in spec.module.model.modules()):
            log.warning(
                "convolutions of parallel clients are slow on a CPU, especially in bfloat16: Sequential is faster there"
            )
        check(spec, lambda probe: VectorizedRunner(probe, self.group_size))
        return VectorizedRunner(spec, self.group_size)


@dataclass
class _Client:
    """A client of a group.

    Attributes:
        session: The client's session.
        member: Its batches and its progress in parallel training.
        attributes: The module's attributes after the client's hooks have run.
        personal: The client's personal state.
    """

    session: ClientSession
    member: Member
    attributes: dict[str, Any]
    personal: State


class VectorizedRunner(Runner):
    """Runner of :class:`Vectorized`.

    Args:
        spec: What to build the worker from.
        group_size: Number of clients that train in parallel.

    Raises:
        ValueError: If parallel training cannot replace the fit by a Trainer.
    """

    def __init__(self, spec: RunSpec, group_size: int) -> None:
        if reason := obstacle(spec.module, compiles=spec.trainer.compile):
            raise ValueError(f"Expected `executor` to suit {type(spec.module).__name__}, got Vectorized: {reason}.")
        if callbacks := spec.trainer.build().callbacks:  # type: ignore[attr-defined]
            raise ValueError(
                f"Expected `executor` to be one that fits by a Trainer, got Vectorized: {type(callbacks[0]).__name__}, which "
                "another package has plugged into Lightning, would not be called."
            )
        self._worker = Worker(spec)
        self.module = self._worker.module
        self._isolation = Isolation(self.module)
        self._group_size = group_size
        self._asks_at_once = asks_at_once(spec.module)
        self._said = 0  # the last round for which a warning said that clients train alone
        self.fault: str | None = None  # why clients that could ask the server together did not
        self.environment = {**self._worker.environment, "clients": f"{group_size} side by side"}

    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task, see :class:`Runner`."""
        if meanwhile:
            meanwhile()
        self._worker.begin(broadcast)
        if broadcast.local_epochs == 0:  # no client trains
            yield from (self._worker.train(task, kept(task.client_id)) for task in tasks)
            return
        for first in range(0, len(tasks), self._group_size):
            group = tasks[first : first + self._group_size]
            makers = [partial(self._worker.session, task, kept(task.client_id)) for task in group]
            outcomes, alone = self.train([make() for make in makers])
            if alone and self._said != broadcast.round_num:
                self._said, reason = broadcast.round_num, next(iter(alone.values()))
                log.warning("round %d: clients train one after the other, by a Trainer: %s", self._said, reason)
            for task, make in zip(group, makers, strict=True):
                if task.client_id in alone:
                    outcome = attempt(self.module, make(), self._worker.spec.trainer)
                    self._isolation.restore()
                    yield outcome
                else:
                    yield outcomes.pop(task.client_id)

    def train(self, sessions: Sequence[ClientSession]) -> tuple[dict[int, Outcome], dict[int, str]]:
        """Train clients in parallel.

        Returns:
            The outcomes by client, and for the other clients the reason why they must be trained alone. In both cases
            the session cannot be used again.
        """
        start, isolation, broadcast = time.perf_counter(), self._isolation, sessions[0].broadcast
        outcomes: dict[int, Outcome] = {}
        alone: dict[int, str] = {}
        clients: dict[int, _Client] = {}
        self._worker.begin(broadcast)
        isolation.begin(sessions[0].payload)
        asked = self._asked(sessions)
        isolation.restore()
        for session in sessions:
            client_id = session.task.client_id
            isolation.give(asked.get(client_id, isolation.attributes))
            try:
                clients[client_id] = self._begun(session)
            except Exception as error:
                outcomes[client_id] = ClientFailure(client_id, session.stage, one_line_reason(error))
            if (changed := isolation.restore()) and clients.pop(client_id, None):
                alone[client_id] = f"what comes before its steps changes {changed} of the module"
        states: Sequence[State] = []
        try:
            states = self._states(list(clients.values()), broadcast) if clients else []
        except Exception as error:  # one program: the error belongs to no single client
            alone |= dict.fromkeys(clients, one_line_reason(error))
        isolation.restore()
        meta = sum(session.seconds["meta step"] for session in sessions)
        share = (time.perf_counter() - start - meta) / len(sessions)
        for (client_id, client), state in zip(clients.items(), states, strict=False):
            try:
                outcomes[client_id] = self._result(client, state, share)
            except Exception as error:
                outcomes[client_id] = ClientFailure(client_id, client.session.stage, one_line_reason(error))
            isolation.give(isolation.attributes)
        return outcomes, alone

    def _states(self, clients: Sequence["_Client"], broadcast: Broadcast) -> list[State]:
        self._isolation.give(self._isolation.common([client.attributes for client in clients], broadcast))
        context = self._worker.spec.trainer.precision_plugin.forward_context
        return undrawn(lambda: train(self.module, [client.member for client in clients], context), self.module.device)

    def _asked(self, sessions: Sequence[ClientSession]) -> dict[int, dict[str, Any]]:
        """Ask the server for all clients at once.

        Returns:
            Client id -> the module's attributes after it took the answer; empty if each client must ask by itself.
        """
        module, worker, start = self.module, self._worker, time.perf_counter()
        if not self._asks_at_once:
            return {}
        seed = derive_seed(sessions[0].task.seed, "question")
        try:
            with worker.spec.trainer.precision_plugin.forward_context(), drawing_from(seed, module.device):
                payloads = module.questions(sessions)
                if payloads is None:
                    return {}
                questions = [session.question(0, payload) for session, payload in zip(sessions, payloads, strict=True)]
                answers = worker.answers(questions)
                taken = zip(sessions, module.take_answers(sessions, answers), strict=True)
                asked = {session.task.client_id: self._isolation.taken() for session, _ in taken}
        except Exception as error:  # if it persists, it is raised again when a client asks by itself
            self.fault = one_line_reason(error)
            for session in sessions:
                session.stage = "training"
            return {}
        for session, question, answer in zip(sessions, questions, answers, strict=True):
            session.count(question, answer)
            session.answer = answer
            session.seconds["meta step"] = (time.perf_counter() - start) / len(sessions)
        return asked

    def _begun(self, session: ClientSession) -> _Client:
        """Prepare a client for its local steps: do what Lightning does before the first batch."""
        module = self.module
        module.session = session
        prepare(module, session, self._worker.spec.trainer)
        if type(module).on_train_start is not FederatedModule.on_train_start:  # the base class draws nothing
            with drawing_from(derive_seed(session.task.seed, "global"), module.device):
                module.on_train_start()
        personal = module.personal_state() if module.personal else {}
        constants = {
            name: value.detach().clone()
            for name, value in module.named_buffers()
            if not name.startswith("model.") and name not in ("mean", "std")
        }
        loader = session.train_loader(module.local_data(session))
        member = Member(loader, len(loader), session.broadcast.local_epochs, constants, personal)
        return _Client(session, member, self._isolation.taken(), personal)

    def _result(self, client: _Client, state: State, seconds: float) -> ClientResult:
        module, session, member = self.module, client.session, client.member
        if member.error:
            raise member.error
        self._isolation.give(client.attributes)
        session.num_steps = member.num_steps
        session.metrics = {"loss": member.loss_sum / member.num_seen, **session.metrics}
        for labels, losses in member.seen:
            module.observe(labels, losses)
        if module.personal or type(module).client_payload is not FederatedModule.client_payload:
            module.load_state_dict({**client.personal, **state}, strict=False)
            with drawing_from(derive_seed(session.task.seed, "global"), module.device):
                payload = copied(module.client_payload())
        else:
            sent = {name: value for name, value in session.payload.items() if name.startswith(module.shared)}
            payload = {name: state.get(name, value) for name, value in sent.items()}
        return result(module, session, payload, seconds + session.seconds["meta step"])
