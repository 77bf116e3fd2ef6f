"""A round by hand, without an orchestrator: a server, and clients that are trained one at a time wherever a test wants them."""

from collections.abc import Callable
from typing import Any

from fedamm_pl import FederatedDataModule, FederatedModule
from fedamm_pl.federation.client import train_client
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors.base import copied
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import Answer, ClientResult, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.seeding import derive_seed

CPU = TrainerConfig(accelerator="cpu", precision="32-true")


class Round:
    """One round of a federation.

    Args:
        module: The algorithm; it is copied.
        data: The clients, and the server's meta set.
        trainer: Where and in which arithmetic.
        state: The server's state, by default the module's.
        round_num: Which round it is.
        local_epochs: Epochs of each client.
        seed: Seed of the run.
        options: Of the aggregation.
    """

    def __init__(
        self,
        module: FederatedModule,
        data: FederatedDataModule,
        trainer: TrainerConfig = CPU,
        *,
        state: State | None = None,
        round_num: int = 1,
        local_epochs: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.made, self.data, self.trainer, self.seed = module, data, trainer, seed
        self.server = Server(copied(module), data, trainer, seed, FederationConfig(1, **options))
        self.state = state or self.server.module.shared_state()
        self.broadcast = self.server.broadcast(self.state, round_num, local_epochs)

    def module(self) -> Any:
        """A module for a client, as it was made."""
        module = copied(self.made)
        self.trainer.place(module)
        return module

    def session(
        self, client: int, ask: Callable[[Question], Answer] | None = None, kept: State | None = None
    ) -> ClientSession:
        task = ClientTask(client, derive_seed(self.seed, "client", self.broadcast.round_num, client))
        return ClientSession(self.broadcast, task, self.data.client, ask or self.server.answer, kept)

    def train(
        self,
        client: int,
        module: FederatedModule | None = None,
        ask: Callable[[Question], Answer] | None = None,
        kept: State | None = None,
    ) -> ClientResult:
        with quiet():
            return train_client(module or self.module(), self.session(client, ask, kept), self.trainer)

    def update(self, results: list[ClientResult]) -> State:
        return self.server.update(self.state, [self.server.contribution(result) for result in results])
