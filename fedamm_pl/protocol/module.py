"""``FederatedModule``: a classifier that also knows both sides of a federated round; by itself, FedAvg."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedamm_pl.data.client import Batch, ClientData
from fedamm_pl.protocol.messages import Answer, ClientResult, Question, State
from fedamm_pl.protocol.privileges import NOTHING, Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.protocol.shared_state import SharedState

CALIBRATED = "calibrated."
"""Prefix of what :meth:`FederatedModule.calibrate` has made, in the server's state until the next round."""


class FederatedModule(SharedState):
    """A classifier that trains in a plain Trainer, or as client and server of a federation; by itself, FedAvg.

    A client's round is a fit on its own data: Lightning's hooks, with ``session`` at hand; ``train/...`` metrics that a
    subclass logs per epoch arrive at the server as ``client/...``. The server's side are the hooks below "Server"; it has a
    module of its own, so nothing passes from a client to the server but what they send.

    Its arguments are those of :class:`~fedamm_pl.protocol.classifier.Classifier`.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {}
    """Prefix -> how the server reduces what clients send beside the shared entries."""

    uses_meta_set: bool = False
    """Whether the method needs the server's balanced meta set; where an option decides, set it in the constructor."""

    trains_on_meta_set: ClassVar[bool] = False
    """Whether a plain Trainer must give it the meta set beside the training set."""

    uses_features: ClassVar[bool] = False
    """Whether the method needs the features that enter the linear layer which gives the network's logits."""

    plain_steps: bool = True
    """Whether a local step, as the hooks of this class stand, is one of SGD on ``step_loss`` alone. Clients then
    can train in parallel. A subclass with a ``training_step`` or other fit hooks of its own that are no more than that says it
    again. What differs between clients in it must be a buffer of the module, set in ``on_train_start``."""

    optimizable: ClassVar[bool] = True
    """Whether a server optimizer can take the place of the average: :meth:`server_step` calls that of this class."""

    session: ClientSession | None = None
    """The round, for the time of a client's fit."""

    @property
    def privileges(self) -> Privileges:
        """What the method needs beyond FedAvg with its options; for the table of methods."""
        return Privileges(server="balanced labelled images" if self.uses_meta_set else NOTHING)

    def check(self, batch: Batch) -> None:
        """Refuse or report what the method cannot do with the network; here nothing.

        Called before the first round. It must not change the module or the random number generators.

        Args:
            batch: A few training images, as the data hold them, and their labels.

        Raises:
            ValueError: If a step would fail, or be wrong without notice.
        """

    # Client

    def log_means(self, means: Mapping[str, Tensor]) -> None:
        """Log the epoch's means; in a federation the client's Trainer only keeps them, as it has no logger."""
        if self.session is None:
            super().log_means(means)
        else:
            self.trainer.callback_metrics.update({f"train/{name}": value for name, value in means.items()})

    @property
    def local_lr(self) -> float:
        """Learning rate of the local SGD; in a federation, that of the round."""
        return super().local_lr * (1.0 if self.session is None else self.session.broadcast.lr_factor)

    @property
    def asks_in_fit(self) -> bool:
        """Whether clients ask questions in the middle of a fit, by ``session.ask``; some executors cannot answer then."""
        return False

    def question(self, session: ClientSession) -> State | None:
        """Return what the client asks the server before its fit, or None; ``session.answer`` has the answer when it starts.

        The module holds the received state and is in training mode. Its draws are a function of the task: where a client
        cannot wait for the answer, the question is computed again in another process.
        """
        return None

    def take_answer(self, answer: Answer) -> None:
        """Process the answer before the fit, in the run's precision; here nothing: ``session.answer`` has it."""

    def questions(self, sessions: Sequence[ClientSession]) -> list[State] | None:
        """Return :meth:`question` of several clients, computed together; None, as here: they are computed one by one.

        Called only of a class whose ``question``, ``answer`` and ``take_answer`` are those of the class that defines this, and
        without personal state. With :meth:`answers` and :meth:`take_answers` it must come to the same but for rounding. Whatever
        they raise, each client is asked by itself then.
        """
        return None

    def take_answers(self, sessions: Sequence[ClientSession], answers: Sequence[Answer]) -> Iterator[None]:
        """Take up the answers to :meth:`questions`; each time it yields, it leaves what ``take_answer`` of the next client leaves."""
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing at once")

    def survey(self, session: ClientSession) -> State:
        """Return statistics of the received model on the client's data; they are sent with the result.

        Called before the fit, in evaluation mode, without gradients, in the arithmetic of the run. ``returned`` says how the
        server reduces them; ``session.surveyed`` has them during the fit.
        """
        return {}

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the data on which the client trains; here its own data, unchanged.

        Called before the fit, after the survey and the answer. The weight of a client depends on the examples that it holds, whatever this
        returns.
        """
        return session.data

    def observe(self, labels: Tensor, losses: Tensor) -> None:
        """Record a batch of the last local epoch for :meth:`tallies` when clients train in parallel; here nothing.

        Args:
            labels: Of shape (B,).
            losses: The :meth:`objective` of its examples before the step, shape (B,).
        """

    def client_payload(self) -> State:
        """Return what the client sends back after its fit, in addition to the survey."""
        return self.shared_state()

    def tallies(self) -> State:
        """Return sums over the last local epoch that the server adds up over the clients, for figures; here none.

        The server sees in them what it would not see in an average, class counts for example: a figure's price.
        """
        return {}

    def statistics(self, session: ClientSession) -> State:
        """Return statistics of the trained model on the client's data, for :meth:`calibrate`.

        Called of all clients, in a round without training, in evaluation mode, without gradients, in the arithmetic of the
        run; the module holds the trained state, and ``session.payload`` what :meth:`broadcast` sends with it. ``returned`` says
        how the server reduces them.
        """
        return {}

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Return what is sent to the clients of a round, given the server's state: the shared entries, and more if needed.

        A client finds the rest in ``session.payload``.
        """
        return {name: value for name, value in state.items() if name.startswith(self.shared)}

    def expected_payload(self, sent: State) -> State:
        """Return what a client must send back, by name, shape and type; a payload that differs is refused.

        Args:
            sent: What was broadcast. Its shared values are those of a client that has learned nothing: lengths of updates
                are measured from them.
        """
        return {name: value for name, value in sent.items() if name.startswith((*self.shared, *self.returned))}

    def answer(self, question: Question, server: ServerSession) -> Answer:
        """Answer a client's question; the module holds the round's broadcast.

        Args:
            question: What the client asks.
            server: ``meta_for(question)`` is the meta set.
        """
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing")

    def answers(self, questions: Sequence[Question], server: ServerSession) -> list[Answer]:
        """Answer :meth:`questions` at once."""
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing at once")

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the part of a client's result that is reduced, for example its payload scaled or converted.

        Args:
            result: A result of the expected names, shapes and types, finite, its update shortened if it was too long.
            server: ``state`` is the server's state at the start of the round, ``sent`` what was broadcast.

        Raises:
            ValueError: If a number in it is out of its possible range; the result is refused.
        """
        return result.payload

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Return the server's next state from the reduced round: the average, or the step of the run's server optimizer along it.

        A subclass that calls this one leaves that to the user; what it changes afterwards it changes in the optimizer's outcome.

        Args:
            state: The last state. The next one may hold more entries than the shared ones; they are kept, also when a run is resumed.
            reduced: The contributions, reduced.
            server: The meta set, generators for draws, the round.
        """
        average = {name: value for name, value in reduced.items() if name.startswith(self.shared)}
        return {**state, **server.optimize(state, average)}

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        """Return the server's next state; override it only if a reduction per prefix is not enough.

        Args:
            state: The last one.
            results: The results of a round with their contributions as payloads, taken one at a time.
            server: How to reduce them.

        Raises:
            ValueError: If there is no result with a weight above 0.
        """
        return self.server_step(state, server.reduce(results), server)

    def calibrates(self, last: bool) -> bool:
        """Return whether :meth:`calibrate` is called before an evaluation; here not.

        Args:
            last: Whether it is the run's last one.
        """
        return False

    def expected_statistics(self, sent: State) -> State:
        """Return what a client's :meth:`statistics` must be, by name, shape and type; here nothing.

        Args:
            sent: What is broadcast.
        """
        return {}

    def accepted_statistics(self, result: ClientResult, server: ServerSession) -> State:
        """Return what of a client's :meth:`statistics` is reduced, as :meth:`contribution` does of what it has trained.

        Args:
            result: A result of the expected names, shapes and types, finite.
            server: ``sent`` is what was broadcast.

        Raises:
            ValueError: If a number in it is out of the range that it can have; the statistics are refused.
        """
        return result.payload

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return shared entries that replace the trained ones in evaluation and delivery; training continues without them.

        The module holds the trained state, in evaluation mode.

        Args:
            state: The server's, after the round.
            statistics: The clients', reduced; empty if the class has no :meth:`statistics` of its own.
            server: The meta set, generators for draws, the round.

        Raises:
            ArithmeticError: If these numbers cannot be used; this is reported, and the trained model is evaluated.
        """
        return {}

    def deployed(self, state: State) -> State:
        """Return the shared entries of the model that is evaluated and delivered, given the server's state."""
        shared = {name: value for name, value in state.items() if name.startswith(self.shared)}
        return {name: state.get(CALIBRATED + name, value) for name, value in shared.items()}

    def personal_logits(self, features: Tensor, logits: Tensor, class_counts: Tensor) -> Tensor:
        """Return the logits of a client's personal model, for ``personal/acc``; methods with personal models override it.

        Called at each evaluation for each client, in evaluation mode, without gradients, in the arithmetic of the run. The module
        holds the deployed state and the client's personal one.

        Args:
            features: What enters the linear layer that gives the deployed model's logits, shape (N, D).
            logits: Of the deployed model, shape (N, C).
            class_counts: The client's examples of each class, shape (C,).

        Returns:
            Shape (N, C).
        """
        raise NotImplementedError(f"{type(self).__name__} clients have no model of their own")

    def diagnostics(self, tallies: State) -> dict[str, list[float | None]]:
        """Return what figures show about the method after a round, while the module holds the deployed state; here nothing.

        Args:
            tallies: The clients' :meth:`tallies`, added up; empty at round 0 and after a failed round.
        """
        return {}
