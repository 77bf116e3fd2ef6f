"""``FederatedModule``: a classifier with hooks for both sides of a federated round; unchanged, it is FedAvg."""

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
"""Prefix of the entries from :meth:`FederatedModule.calibrate`, kept in the server's state until the next round."""


class FederatedModule(SharedState):
    """A classifier that trains in a plain Trainer, or as client and server of a federation; unchanged, it is FedAvg.

    A client's round is a fit on its own data, with Lightning's hooks; they can use ``session``. Metrics ``train/...``
    that a subclass logs per epoch arrive at the server as ``client/...``. The server's side consists of the hooks below
    "Server". The server has a separate module, so the only information that passes from a client to the server is in
    their messages.

    Its arguments are those of :class:`~fedamm_pl.protocol.classifier.Classifier`.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {}
    """Prefix -> how the server reduces the entries that clients send in addition to the shared ones."""

    uses_meta_set: bool = False
    """Whether the method needs the server's balanced meta set; if this depends on an option, set it in the
    constructor."""

    trains_on_meta_set: ClassVar[bool] = False
    """Whether a plain Trainer must provide the meta set in addition to the training set."""

    uses_features: ClassVar[bool] = False
    """Whether the method needs the features, the input of the linear layer that returns the network's logits."""

    plain_steps: bool = True
    """Whether a local step, with the hooks of this class, is only an SGD step on ``step_loss``, so that clients can
    train in parallel. A subclass that overrides ``training_step`` or other fit hooks, but still takes only such steps,
    must set this attribute again. Values that differ between clients must be buffers of the module, set in
    ``on_train_start``."""

    optimizable: ClassVar[bool] = True
    """Whether a server optimizer can replace the average; :meth:`server_step` must then call the base method."""

    session: ClientSession | None = None
    """The client's session during its fit, else None."""

    @property
    def privileges(self) -> Privileges:
        """What the method, with its present options, needs beyond FedAvg; for the table of methods."""
        return Privileges(server="balanced labelled images" if self.uses_meta_set else NOTHING)

    def check(self, batch: Batch) -> None:
        """Raise an error or report a problem if the method does not work with the network; by default does nothing.

        Called before the first round. It must not change the module or the random number generators.

        Args:
            batch: A few training images, in the form in which the data hold them, and their labels.

        Raises:
            ValueError: If a step would fail, or would be wrong without an error.
        """

    # Client

    def log_means(self, means: Mapping[str, Tensor]) -> None:
        """Log the means of an epoch; in a federation the client's Trainer, which has no logger, only stores them."""
        if self.session is None:
            super().log_means(means)
        else:
            self.trainer.callback_metrics.update({f"train/{name}": value for name, value in means.items()})

    @property
    def local_lr(self) -> float:
        """Learning rate of the local SGD; in a federation, the learning rate of the round."""
        return super().local_lr * (1.0 if self.session is None else self.session.broadcast.lr_factor)

    @property
    def asks_in_fit(self) -> bool:
        """Whether clients ask questions during a fit, with ``session.ask``; some executors cannot answer these."""
        return False

    def question(self, session: ClientSession) -> State | None:
        """Return the client's question to the server before its fit, or None.

        The answer is in ``session.answer`` when the fit starts. The module holds the received state and is in training
        mode. Its random draws are a function of the task: if a client cannot wait for the answer, the question is
        computed again in another process.
        """
        return None

    def take_answer(self, answer: Answer) -> None:
        """Process the answer before the fit, in the run's precision.

        By default this does nothing; the answer is in ``session.answer``.
        """

    def questions(self, sessions: Sequence[ClientSession]) -> list[State] | None:
        """Return the :meth:`question` of several clients, computed together, or None to compute each separately.

        The default is None. This method is only called for a class whose ``question``, ``answer`` and ``take_answer``
        are those of the class that defines it, and only without personal state. Together with :meth:`answers` and
        :meth:`take_answers`, it must give the same results up to rounding. If one of the three raises any error, the
        clients are asked one by one.
        """
        return None

    def take_answers(self, sessions: Sequence[ClientSession], answers: Sequence[Answer]) -> Iterator[None]:
        """Process the answers to :meth:`questions`.

        Each time it yields, the module is as ``take_answer`` of the next client would leave it.
        """
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing at once")

    def survey(self, session: ClientSession) -> State:
        """Return statistics of the received model on the client's data; they are sent with the result.

        Called before the fit, in evaluation mode, without gradients, in the run's precision. ``returned`` declares how
        the server reduces the statistics; during the fit they are in ``session.surveyed``.
        """
        return {}

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the data on which the client trains; by default its own data, unchanged.

        Called before the fit, after the survey and the answer. The weight of a client depends on the examples that it
        holds, not on the data returned here.
        """
        return session.data

    def observe(self, labels: Tensor, losses: Tensor) -> None:
        """Record a batch of the last local epoch for :meth:`tallies`, when clients train in parallel. Default: nothing.

        Args:
            labels: Classes of shape (B,).
            losses: The :meth:`objective` of the examples before the step, shape (B,).
        """

    def client_payload(self) -> State:
        """Return the tensors that the client sends back after its fit, in addition to the survey."""
        return self.shared_state()

    def tallies(self) -> State:
        """Return sums over the last local epoch that the server adds up over the clients for figures; empty by default.

        They can reveal to the server what an average would not reveal, for example class counts.
        """
        return {}

    def statistics(self, session: ClientSession) -> State:
        """Return statistics of the trained model on the client's data, for :meth:`calibrate`.

        Called for all clients, in a round without training, in evaluation mode, without gradients, in the run's
        precision. The module holds the trained state, and ``session.payload`` holds the output of :meth:`broadcast`.
        ``returned`` declares how the server reduces the statistics.
        """
        return {}

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Return what is sent to the clients of a round: the shared entries of the server's state, and more if needed.

        A client finds the additional entries in ``session.payload``.
        """
        return {name: value for name, value in state.items() if name.startswith(self.shared)}

    def expected_payload(self, sent: State) -> State:
        """Return tensors with the names, shapes and types that a client must send back; a different payload is refused.

        Args:
            sent: The broadcast payload. Its shared values are those of a client that has learned nothing; the lengths
                of updates are measured from them.
        """
        return {name: value for name, value in sent.items() if name.startswith((*self.shared, *self.returned))}

    def answer(self, question: Question, server: ServerSession) -> Answer:
        """Answer a client's question; the module holds the round's broadcast.

        Args:
            question: The client's question.
            server: ``meta_for(question)`` returns the meta set.
        """
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing")

    def answers(self, questions: Sequence[Question], server: ServerSession) -> list[Answer]:
        """Answer the :meth:`questions` of several clients at once."""
        raise NotImplementedError(f"{type(self).__name__} clients ask the server nothing at once")

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the part of a client's result that is reduced, for example its payload scaled or converted.

        Args:
            result: A finite result with the expected names, shapes and types; its update is shortened if it was too
                long.
            server: ``state`` is the server's state at the start of the round, ``sent`` the broadcast payload.

        Raises:
            ValueError: If a number in the result is out of its possible range; the result is then refused.
        """
        return result.payload

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Return the server's next state: the average, or the result of the run's server optimizer for it.

        A subclass that calls this method leaves that choice to the user; its own later changes apply to the optimizer's
        result.

        Args:
            state: The last state. The next state may hold more entries than the shared ones; they are kept, also when a
                run is resumed.
            reduced: The reduced contributions.
            server: The meta set, generators for draws, the round.
        """
        average = {name: value for name, value in reduced.items() if name.startswith(self.shared)}
        return {**state, **server.optimize(state, average)}

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        """Return the server's next state; override it only if a reduction per prefix is not enough.

        Args:
            state: The last state.
            results: The results of a round, whose payloads are their contributions; they are read one at a time.
            server: Provides the reduction.

        Raises:
            ValueError: If there is no result with a weight above 0.
        """
        return self.server_step(state, server.reduce(results), server)

    def calibrates(self, last: bool) -> bool:
        """Return whether :meth:`calibrate` is called before an evaluation; False by default.

        Args:
            last: Whether it is the run's last evaluation.
        """
        return False

    def expected_statistics(self, sent: State) -> State:
        """Return tensors with the names, shapes and types that a client's :meth:`statistics` must have. Default: none.

        Args:
            sent: The broadcast payload.
        """
        return {}

    def accepted_statistics(self, result: ClientResult, server: ServerSession) -> State:
        """Return the part of a client's :meth:`statistics` that is reduced, as :meth:`contribution` after training.

        Args:
            result: A finite result with the expected names, shapes and types.
            server: ``sent`` is the broadcast payload.

        Raises:
            ValueError: If a number in the result is out of its possible range; the statistics are then refused.
        """
        return result.payload

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return shared entries that replace the trained ones in evaluation and in the delivered model.

        Training continues without them. The module holds the trained state and is in evaluation mode.

        Args:
            state: The server's state after the round.
            statistics: The clients' reduced statistics; empty if the class does not override :meth:`statistics`.
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
        """Return the logits of a client's personal model for ``personal/acc``; methods with such models override it.

        Called at each evaluation for each client, in evaluation mode, without gradients, in the run's precision. The
        module holds the deployed state and the client's personal state.

        Args:
            features: Input of the linear layer that returns the deployed model's logits, shape (N, D).
            logits: Logits of the deployed model, shape (N, C).
            class_counts: The client's number of examples of each class, shape (C,).

        Returns:
            Logits of shape (N, C).
        """
        raise NotImplementedError(f"{type(self).__name__} clients have no model of their own")

    def diagnostics(self, tallies: State) -> dict[str, list[float | None]]:
        """Return values for the method's figures after a round; the module holds the deployed state. Empty by default.

        Args:
            tallies: The clients' :meth:`tallies`, added up; empty at round 0 and after a failed round.
        """
        return {}
