"""``Server``: holds a module, the meta set and the seed; broadcasts, answers questions and reduces clients' results."""

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.aggregation import Reducer
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.server_optimizers import ServerOptimizer
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientResult, Question, State
from fedamm_pl.protocol.module import CALIBRATED, FederatedModule
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ServerSession
from fedamm_pl.seeding import derive_seed, drawing_from, torch_generator


class ServerOptimizerError(ValueError):
    """Raised if there is a server optimizer, but the method computes its next state without it."""


class Server:
    """The server's side of a federation. Clients communicate with it only by messages.

    In a simulation each worker has its own server to answer its clients. This is possible because an answer is a
    function of the broadcast, the question and the seed.

    Args:
        module: The server's own module; its state is overwritten.
        data: The data, with the meta set.
        trainer: Device and precision.
        seed: Seed of all random draws.
        config: How it aggregates, and which server optimizer it uses; only needed to reduce results.
    """

    def __init__(
        self,
        module: FederatedModule,
        data: FederatedDataModule,
        trainer: TrainerConfig,
        seed: int,
        config: FederationConfig | None = None,
    ) -> None:
        trainer.place(module)
        self.module = module
        self.data = data
        self.trainer = trainer
        self.seed = seed
        self.config = config
        self.optimizer = None if config is None else ServerOptimizer.of(config)
        self._stepped = False  # whether the optimizer has taken a step in the round
        self.session = self._open(0, 1, {})

    def broadcast(self, state: State, round_num: int, local_epochs: int) -> Broadcast:
        """Start a round and return the broadcast to its clients."""
        self.session = self._open(round_num, local_epochs, state)
        factor = self.config.lr_decay ** (round_num - 1) if self.config else 1.0
        with self._drawing("broadcast"):
            broadcast = Broadcast(round_num, local_epochs, self.module.broadcast(state, self.session), factor)
        self.take_up(broadcast)
        return broadcast

    def begin(self, broadcast: Broadcast) -> None:
        """Start a round with the broadcast of another server."""
        self.session = self._open(broadcast.round_num, broadcast.local_epochs, {})
        self.take_up(broadcast)

    def expected_payload(self) -> State:
        """Return what a client of the round must send back, by name, shape and type."""
        return self.module.expected_payload(self.session.sent)

    def answer(self, question: Question) -> Answer:
        """Answer a client's question in the precision of the run."""
        draws = self._drawing("answer", question.client_id, question.step)
        with draws, self.trainer.precision_plugin.forward_context():
            return self.module.answer(question, self.session)

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer several clients at once, if the method supports it."""
        with self._drawing("answers"), self.trainer.precision_plugin.forward_context():
            return self.module.answers(questions, self.session)

    def contribution(self, result: ClientResult) -> ClientResult:
        """Return a result whose payload is the part of it that is reduced.

        Raises:
            ValueError: If the method refuses the result.
        """
        if type(self.module).contribution is FederatedModule.contribution:  # the base class draws nothing
            return result
        with self._drawing("contribution", result.client_id):
            return dataclasses.replace(result, payload=self.module.contribution(result, self.session))

    def update(self, state: State, contributions: Iterable[ClientResult]) -> State:
        """Return the server's next state; ``state``, the last one, is unchanged.

        Raises:
            ServerOptimizerError: If there is a server optimizer, but the method computes its next state without it.
        """
        own = {name: value.clone() for name, value in trained(state).items()}  # the method may work in place
        self._stepped = False
        with self._drawing("update"):
            updated = self.module.server_update(own, contributions, self.session)
        if self.optimizer is not None and not self._stepped:
            raise ServerOptimizerError(not_optimizable(self.module, self.optimizer.kind))
        return updated

    def _optimize(self, state: State, average: State) -> State:
        self._stepped = True
        if self.optimizer is None:
            return average
        parameters = self.module.named_parameters(remove_duplicate=False)  # tied parameters under all their names
        return self.optimizer.step(
            state, average, {name for name, value in parameters if value.requires_grad and name.startswith("model.")}
        )

    def expected_statistics(self) -> State:
        """Return the statistics that a client must send in a round without training, by name, shape and type."""
        return self.module.expected_statistics(self.session.sent)

    def accepted_statistics(self, result: ClientResult) -> ClientResult:
        """Return a client's statistics as a result whose payload is the part of them that is reduced.

        Raises:
            ValueError: If the method refuses the statistics.
        """
        with self._drawing("statistics", result.client_id):
            return dataclasses.replace(result, payload=self.module.accepted_statistics(result, self.session))

    def calibrated(self, state: State, results: Iterable[ClientResult]) -> State:
        """Return the state together with the calibrated entries that the method computes for an evaluation.

        Args:
            state: The state after a round, which :meth:`broadcast` has sent.
            results: The clients' statistics; empty if the method uses none.

        Raises:
            ArithmeticError: If the method cannot calibrate with these numbers.
            ValueError: If it returns entries that the shared model does not have, or of other shapes.
        """
        own = {name: value.clone() for name, value in state.items()}
        training = self.module.training
        self.module.eval()
        try:
            with self._drawing("calibration"):
                statistics = self._reduce(results) if takes_statistics(self.module) else {}
                made = self.module.calibrate(own, statistics, self.session)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # no decomposition of these numbers
            raise ArithmeticError(" ".join(str(error).split())) from error
        finally:
            self.module.train(training)
        shapes = {name: value.shape for name, value in state.items() if name.startswith(self.module.shared)}
        if unknown := sorted(name for name, value in made.items() if shapes.get(name) != value.shape):
            raise ValueError(
                f"Expected `calibrate` of {type(self.module).__name__} to give shared entries in their shapes, got {unknown}."
            )
        return {**state, **{CALIBRATED + name: value.to(state[name]) for name, value in made.items()}}

    def _drawing(self, purpose: str, *keys: int) -> AbstractContextManager[None]:
        """Return a context in which a hook's random draws, such as dropout, depend on the run's seed only."""
        return drawing_from(derive_seed(self.seed, purpose, self.session.round_num, *keys), self.module.device)

    def _open(self, round_num: int, local_epochs: int, state: State) -> ServerSession:
        return ServerSession(
            round_num=round_num,
            num_clients=self.data.num_clients,
            local_epochs=local_epochs,
            meta=lambda draw: self.data.meta_batch(derive_seed(self.seed, "server_meta", round_num, draw)),
            meta_for=lambda question: self.data.meta_batch(
                derive_seed(self.seed, "meta", round_num, question.client_id, question.step)
            ),
            generator=lambda purpose: torch_generator(derive_seed(self.seed, f"server {purpose}", round_num)),
            reduce=self._reduce,
            optimize=self._optimize,
            state=state,
        )

    def take_up(self, broadcast: Broadcast) -> None:
        """Load the broadcast into the module, as clients do; called again after an evaluation during the round."""
        self.session.sent = broadcast.payload
        self.module.load_shared_state(broadcast.payload)

    def _reduce(self, contributions: Iterable[ClientResult]) -> State:
        config = self.config
        assert config is not None
        averaged: dict[str, Reduction] = dict.fromkeys(self.module.shared, "average")
        reducer = Reducer({**averaged, **self.module.returned}, config)
        for result in contributions:
            reducer.add(result.payload, result.num_examples)
            self.session.num_results += 1
        state = self.session.state  # results from other processes are on the CPU
        return {
            name: value.to(state[name].device if name in state else value.device)
            for name, value in reducer.compute().items()
        }


def not_optimizable(module: FederatedModule, kind: str) -> str:
    """Return the error message for a server optimizer with a method whose server computes the next model itself."""
    return (
        f"Expected `server_optimizer` to be none for {type(module).__name__}, got {kind}: its server makes the next model by "
        "itself, not from the average."
    )


def trained(state: State) -> State:
    """Return a server's state without the calibrated entries."""
    return {name: value for name, value in state.items() if not name.startswith(CALIBRATED)}


def takes_statistics(module: FederatedModule) -> bool:
    """Return whether a method's calibration uses statistics of the clients."""
    return type(module).statistics is not FederatedModule.statistics
