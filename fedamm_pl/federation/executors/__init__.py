"""Executors: where the clients of a round train."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import Answer, ClientFailure, ClientResult, ClientTask, Question, payload_bytes
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed

if TYPE_CHECKING:
    from fedamm_pl.protocol.module import FederatedModule


class Executor(Protocol):
    """Trains clients, anywhere. Algorithms do not know which executor they run on.

    A client that raises an ``Exception`` costs the round its result and nothing else.

    Attributes:
        can_time_out: Whether it gives up a client after the ``timeout`` of its task.
    """

    can_time_out: bool

    def run(
        self,
        module: "FederatedModule",
        client_data: Callable[[int], ClientData],
        tasks: Iterable[ClientTask],
        answer: Callable[[Question], Answer],
    ) -> Iterator[ClientResult | ClientFailure]:
        """Train the client of each task.

        Args:
            module: The algorithm; its state may be overwritten.
            client_data: Client id -> its data.
            tasks: Sorted by client id.
            answer: The server's side of a client's questions.

        Yields:
            One result per task, or why there is none, in the order of the tasks.
        """
        ...


class SequentialExecutor:
    """Trains one client after the other in this process, each by a fresh quiet Trainer on one resident module.

    Args:
        trainer: Where and in which arithmetic to train.
    """

    can_time_out = False

    def __init__(self, trainer: TrainerConfig | None = None) -> None:
        self.trainer = trainer or TrainerConfig()

    def run(
        self,
        module: "FederatedModule",
        client_data: Callable[[int], ClientData],
        tasks: Iterable[ClientTask],
        answer: Callable[[Question], Answer],
    ) -> Iterator[ClientResult | ClientFailure]:
        """Train the client of each task, see :class:`Executor`."""
        for task in tasks:
            received = {name: value.clone() for name, value in task.payload.items()}  # the client may write on it
            session = ClientSession(dataclasses.replace(task, payload=received), client_data, answer)
            outcome: ClientResult | ClientFailure
            try:
                with quiet():
                    outcome = self._train(module, session)
            except Exception as error:
                outcome = ClientFailure(task.client_id, session.stage, one_line_reason(error))
            yield outcome

    def _train(self, module: "FederatedModule", session: ClientSession) -> ClientResult:
        start = time.perf_counter()
        task = session.task
        module.load_shared_state(task.payload)
        module.train()  # fit keeps the mode that it finds: eval after an evaluation
        module.session = session
        trainer = self.trainer.build(max_epochs=task.local_epochs)
        try:
            devices = [module.device] if module.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # dropout and the like draw from the global state
                torch.manual_seed(derive_seed(task.seed, "global"))
                trainer.fit(module, session.train_loader())
            # copies: the next client trains on the same module
            payload = {name: value.detach().clone() for name, value in module.client_payload().items()}
            tallies = module.tallies()
        finally:
            module.session = None
        meta_seconds = session.seconds["meta step"]
        return ClientResult(
            client_id=task.client_id,
            num_examples=session.data.num_examples,
            payload=payload,
            metrics={
                name.removeprefix("train/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train/")
            },
            bytes_received=session.bytes_received,
            bytes_sent=session.bytes_sent + payload_bytes(payload),
            train_seconds=time.perf_counter() - start - meta_seconds,
            meta_seconds=meta_seconds,
            kept=session.kept,
            tallies=tallies,
        )


def one_line_reason(error: Exception) -> str:
    """Return type and first line of an error, and the innermost place in code that is not an installed package."""
    summary = traceback.TracebackException.from_exception(error)  # also where str(error) itself raises
    own = [frame for frame in summary.stack if "site-packages" not in frame.filename] or summary.stack
    text = next(iter(str(summary).strip().splitlines()), "")
    return f"{type(error).__name__}: {text:.200} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
