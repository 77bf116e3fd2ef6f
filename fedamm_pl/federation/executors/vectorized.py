"""Clients in groups, each group trained side by side in one program, in this process."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.client import attempt, copied, one_line_reason, prepare, result
from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.obstacles import asks_at_once, obstacle
from fedamm_pl.federation.executors.side_by_side import Member, train
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.trainer import PrecisionName
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed, drawing_from

log = logging.getLogger(__name__)
PRECISIONS: tuple[PrecisionName, ...] = ("64-true", "32-true")
"""In which clients are compared, the second for networks that do not take the first. A step of a deep network can magnify rounding
by a million: only in the first is every mistake larger than that."""
TOLERANCE = {"64-true": 1e-6, "32-true": 0.2}
"""Largest difference of an update, relative to its length, between a client trained side by side and by a Trainer."""
FEW = 8
"""Examples of a batch on which they are compared."""


@dataclass(frozen=True)
class Vectorized(Executor):
    """Trains clients in groups, side by side in one program in this process: fast for many small clients.

    A result is that of one client after the other but for rounding. It takes methods whose local step is plain SGD on an
    objective of each example, and networks that draw nothing while they train; of the others it says why not.
    """

    group_size: int = 64
    """Clients that train side by side. Each takes as much memory as its parameters, three times, and its batch."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"Expected `group_size` to be 1 or more, got {self.group_size}.")

    @property
    def together(self) -> int:
        """The size of a group."""
        return self.group_size

    def open(self, spec: RunSpec) -> Runner:
        """Build the one worker, and compare two clients with what a Trainer makes of them.

        Raises:
            ValueError: If method or network cannot be trained side by side.
        """
        for precision in PRECISIONS[spec.trainer.kind == "mps" :]:  # which has no float64
            probe = replace(spec, trainer=replace(spec.trainer, precision=precision))
            if VectorizedRunner(probe, self.group_size).check():
                break
        return VectorizedRunner(spec, self.group_size)


@dataclass
class _Client:
    """A client of a group.

    Attributes:
        session: Its session.
        member: What trains.
        attributes: The module's attributes as its hooks have left them.
        personal: Its personal state.
    """

    session: ClientSession
    member: Member
    attributes: dict[str, Any]
    personal: State


class VectorizedRunner(Runner):
    """See :class:`Vectorized`.

    Args:
        spec: What to build the worker from.
        group_size: Clients that train side by side.

    Raises:
        ValueError: If the method's own fit cannot be replaced.
    """

    def __init__(self, spec: RunSpec, group_size: int) -> None:
        if reason := obstacle(spec.module, compiles=spec.trainer.compile):
            raise ValueError(f"Expected `executor` to suit {type(spec.module).__name__}, got Vectorized: {reason}.")
        self._worker = Worker(spec)
        self._module = self._worker.module
        self._personal = self._module.personal_state()
        self._group_size = group_size
        self._asks_at_once = asks_at_once(spec.module)
        self._fault: str | None = None  # why clients that could ask at once did not
        self.environment = {**self._worker.environment, "clients": f"{group_size} side by side"}

    def run(self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept) -> Iterator[Outcome]:
        """Train the client of each task, see :class:`Runner`."""
        self._worker.begin(broadcast)
        for first in range(0, len(tasks), self._group_size):
            group = tasks[first : first + self._group_size]
            yield from self._train([self._worker.session(task, kept(task.client_id)) for task in group])

    def _train(self, sessions: Sequence[ClientSession]) -> Iterator[Outcome]:
        start, module = time.perf_counter(), self._module
        failures: dict[int, Exception] = {}
        clients: dict[int, _Client] = {}
        module.load_shared_state(sessions[0].payload)
        module.train()
        before = _attributes(module)
        asked = self._asked(sessions)
        for session in sessions:
            _set_attributes(module, asked.get(session.task.client_id, before))
            try:
                clients[session.task.client_id] = self._begun(session)
            except Exception as error:
                failures[session.task.client_id] = error
            _set_attributes(module, before)
        try:
            group = list(clients.values())
            if group:  # what its hooks have set beside buffers is the same for all, as the check has seen
                _set_attributes(module, group[0].attributes)
            context = self._worker.spec.trainer.precision_plugin.forward_context
            states = train(module, [client.member for client in group], context) if group else []
        except Exception as error:  # one program: it is nobody's alone
            failures |= dict.fromkeys(clients, error)
            states = []
        trained = dict(zip(clients, states, strict=False))
        meta = sum(session.seconds["meta step"] for session in sessions)
        share = (time.perf_counter() - start - meta) / len(sessions)
        for session in sessions:
            client_id = session.task.client_id
            try:
                if cause := failures.get(client_id) or clients[client_id].member.error:
                    raise cause
                yield self._result(clients[client_id], trained[client_id], share)
            except Exception as error:
                yield ClientFailure(client_id, session.stage, one_line_reason(error))
            finally:
                _set_attributes(module, before)

    def _asked(self, sessions: Sequence[ClientSession]) -> dict[int, dict[str, Any]]:
        """Ask for all clients at once; return the module's attributes of each client then, of none if each must ask by itself."""
        module, worker, start = self._module, self._worker, time.perf_counter()
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
                asked = {session.task.client_id: _attributes(module) for session, _ in taken}
        except Exception as error:  # raised again where it belongs: when the client asks by itself, or never
            self._fault = one_line_reason(error)
            for session in sessions:
                session.stage = "training"
            return {}
        for session, question, answer in zip(sessions, questions, answers, strict=True):
            session.count(question, answer)
            session.answer = answer
            session.seconds["meta step"] = (time.perf_counter() - start) / len(sessions)
        return asked

    def _begun(self, session: ClientSession) -> _Client:
        """Do what comes before a client's steps: what Lightning calls until its first batch."""
        module = self._module
        module.session = session
        prepare(module, session, self._worker.spec.trainer)
        if type(module).on_train_start is not FederatedModule.on_train_start:  # which draws nothing
            with drawing_from(derive_seed(session.task.seed, "global"), module.device):
                module.on_train_start()
        personal = module.personal_state() if module.personal else {}
        constants = {name: value for name, value in module.named_buffers(recurse=False) if name not in ("mean", "std")}
        loader = session.train_loader()
        member = Member(loader, len(loader), session.broadcast.local_epochs, constants, personal)
        return _Client(session, member, _attributes(module), personal)

    def _result(self, client: _Client, state: State, seconds: float) -> ClientResult:
        module, session, member = self._module, client.session, client.member
        _set_attributes(module, client.attributes)
        session.num_steps = member.num_steps
        session.metrics = {"loss": member.loss_sum / member.num_seen, **session.metrics}
        for labels, losses in member.seen:
            module.observe(labels, losses)
        if module.personal or type(module).client_payload is not FederatedModule.client_payload:
            module.load_state_dict({**client.personal, **state}, strict=False)
            with drawing_from(derive_seed(session.task.seed, "global"), module.device):
                payload = copied(module.client_payload())
        else:
            payload = {name: state.get(name, value) for name, value in self._sent(session).items()}
        return result(module, session, payload, seconds + session.seconds["meta step"])

    def _sent(self, session: ClientSession) -> State:
        return {name: value for name, value in session.payload.items() if name.startswith(self._module.shared)}

    def check(self) -> bool:
        """Train two clients on a few batches, and compare each with what a Trainer makes of it.

        Returns:
            Whether there was something to compare: False if a Trainer fails with both.

        Raises:
            ValueError: If they cannot be trained side by side, or differ by more than rounding explains.
        """
        worker, data = self._worker, self._worker.spec.data
        precision = worker.spec.trainer.precision
        worker.module.to(torch.float64 if precision == "64-true" else torch.float32)
        by_size = sorted(range(data.num_clients), key=lambda client: -data.client_size(client))
        clients = [client for client in by_size if data.client_size(client)][:2]
        start = worker.module.shared_state()
        broadcast = worker.server.broadcast(start, 0, 1)
        # not equally many steps, and last batches of different size
        few = {client: _some(data.client(client), 2.5 - place) for place, client in enumerate(clients)}
        sessions = [
            [
                ClientSession(broadcast, ClientTask(client, client), few.__getitem__, worker.answer, self._personal)
                for client in clients
            ]
            for _ in range(2)
        ]
        worker.begin(broadcast)
        together = list(self._train(sessions[0]))  # first: a fit by a Trainer may leave attributes behind
        plain = [attempt(worker.module, session, worker.spec.trainer) for session in sessions[1]]
        compared = False
        for expected, found in zip(plain, together, strict=True):
            if isinstance(expected, ClientFailure):
                continue  # no matter of this executor
            compared = True
            if isinstance(found, ClientResult):
                reason = _difference(expected, found, start, TOLERANCE[precision])
            else:
                drawn = "randomness" in found.reason  # in a long message of vmap's
                reason = "its network draws random numbers while it trains, as dropout does" if drawn else found.reason
            if reason:
                name = f"{type(worker.module).__name__} with {worker.module.network_name}"
                raise ValueError(f"Expected `executor` to suit {name}, got Vectorized: {reason}.")
        if self._fault and compared:
            log.warning("clients ask the server one after the other, since all at once would not do: %s", self._fault)
        return compared


def _some(data: ClientData, batches: float) -> ClientData:
    """Return a client with a few small batches of its examples, taken from all over them."""
    size = max(1, min(data.batch_size, data.num_examples // 3, FEW))
    count = min(data.num_examples, max(1, int(batches * size)))
    chosen = torch.linspace(0, data.num_examples - 1, count).long()
    return replace(data, batch_size=size, indices=data.indices[chosen])


def _difference(expected: ClientResult, found: ClientResult, start: State, tolerance: float) -> str | None:
    """Return in what two results differ, if they do by more than rounding explains."""
    for part in ("payload", "metrics", "kept", "tallies"):
        if other := sorted(getattr(expected, part).keys() ^ getattr(found, part).keys()):
            return f"its {part} has or lacks {other[0]}"
    for name, value in {**expected.payload, **expected.kept}.items():
        now = {**found.payload, **found.kept}[name].to(value)
        before = start[name].to(value) if name in start else torch.zeros_like(value)
        moved, gap, length = (float(part.double().norm()) for part in (value - before, value - now, value))
        if math.isfinite(moved) and not gap <= tolerance * (moved + tolerance * length):
            return (
                f"after a few steps {name} is not what a Trainer makes of it, by {gap / (moved or 1):.2g} of the change"
            )
    for name, number in expected.metrics.items():
        if math.isfinite(number) and not abs(number - found.metrics[name]) <= tolerance * max(1, abs(number)):
            return f"its {name} is {found.metrics[name]:.4g}, a Trainer's {number:.4g}"
    return None


def _attributes(module: FederatedModule) -> dict[str, Any]:
    """Return what a module has beside its parts; its own buffers are assigned, not written to."""
    return {**vars(module), "_buffers": dict(module._buffers)}


def _set_attributes(module: FederatedModule, attributes: Mapping[str, Any]) -> None:
    """Give a module what :func:`_attributes` has returned."""
    vars(module).clear()
    vars(module).update(attributes, _buffers=dict(attributes["_buffers"]))
