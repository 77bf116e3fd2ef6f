"""``MetaExchange``: both sides of FedAMM's exchange of w_hat and meta gradient, for one client and for several at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import meta_gradient, training_mode, virtual_step
from fedamm_pl.algorithms.meta.suited import fault, suited
from fedamm_pl.algorithms.meta.together import VirtualSteps, expanded, meta_gradients, stacked, unstacked, virtual_steps
from fedamm_pl.algorithms.meta.virtual_steps import VirtualStep
from fedamm_pl.data.client import Batch
from fedamm_pl.models.masked import padded
from fedamm_pl.protocol.messages import Answer, Question, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession, ServerSession


class MetaExchange(FederatedModule):
    """A module with a weight net, whose clients take the virtual step and the meta step, and whose server has the meta gradient.

    Abstract: a subclass makes ``weight_net``, has the options ``meta_lr``, ``meta_update`` and ``differentiation``, and trains.
    """

    shared = ("model.", "weight_net.")
    uses_meta_set = True

    weight_net: nn.Module
    _step: VirtualStep | None = None  # taken, and waiting for its meta gradient
    _steps: VirtualSteps | None = None  # the same of several clients
    _meta_loss: Tensor | None = None
    _returned_weight_net: State = {}  # noqa: RUF012  replaced, never changed

    # Client

    @property
    def asks_in_fit(self) -> bool:
        """Whether the update is synchronous."""
        return bool(self.hparams["meta_update"] == "synchronous")

    def question(self, session: ClientSession) -> State | None:
        """Asynchronous: take the virtual step of the round, and ask for the meta gradient at w_hat."""
        self._meta_loss = None
        return None if self.asks_in_fit else self._virtual_step(self._on_device(*session.support()))

    def take_answer(self, answer: Answer) -> None:
        """Asynchronous: do the round's one meta step, and put its outcome aside for the result."""
        received = self._weight_net_state()
        self._meta_step(answer, self.sgd(self.weight_net, self.hparams["meta_lr"]))
        self._returned_weight_net = self._weight_net_state()
        self.load_state_dict(received, strict=False)
        if self.session is not None and self._meta_loss is not None:
            self.session.metrics["meta_loss"], self._meta_loss = self._meta_loss, None

    def questions(self, sessions: Sequence[ClientSession]) -> list[State] | None:
        """Asynchronous: take the virtual steps of several clients at once, if forward mode is right for the network."""
        images, labels, present, sizes = padded([session.support() for session in sessions])
        images, labels = self._stack_on_device(images, labels)
        present = None if present is None else present.to(self.device)
        largest = sizes.index(max(sizes))
        if fault(self.model, (images[largest], labels[largest]), "forward"):
            return None
        self._meta_loss = None
        lr = self.hparams["lr"] * sessions[0].broadcast.lr_factor  # of all of them
        self._steps = virtual_steps(self.model, self.weight_net, images, labels, present, lr)
        return unstacked(self._steps.params, "model.")

    def take_answers(self, sessions: Sequence[ClientSession], answers: Sequence[Answer]) -> Iterator[None]:
        """Asynchronous: do the meta steps of several clients at once."""
        steps, self._steps = self._steps, None
        assert steps is not None
        found = steps.weight_net_gradients(stacked([answer.payload for answer in answers], "model.", self.device))
        each = expanded(self.weight_net, len(sessions))
        updated = nn.ParameterList(value.detach().clone() for value in each.values())
        for parameter, gradient in zip(updated, found.values(), strict=True):
            parameter.grad = gradient
        self.sgd(updated, self.hparams["meta_lr"]).step()  # element by element
        rows = unstacked(dict(zip(each, updated, strict=True)), "weight_net.")
        for session, answer, row in zip(sessions, answers, rows, strict=True):
            self._returned_weight_net = {**self._weight_net_state(), **row}
            session.metrics["meta_loss"] = answer.metrics["meta_loss"]
            yield

    def _virtual_step(self, support: Batch) -> State:
        """Take step 1 of a round and return w_hat; the step is kept for :meth:`_meta_step`."""
        way, _ = suited(self.model, support, self.hparams["differentiation"])
        self._step = step = virtual_step(self.model, self.weight_net, support, self.local_lr, way, self._joint)
        return {f"model.{name}": value for name, value in step.params.items()}

    def _meta_step(self, answer: Answer, optimizer: torch.optim.Optimizer) -> None:
        """Update the weight net in place by steps 3 and 4 of a round.

        Args:
            answer: The meta gradient at w_hat, and the meta loss there.
            optimizer: The weight net's.
        """
        gradient = {name.removeprefix("model."): value.to(self.device) for name, value in answer.payload.items()}
        self._meta_loss = answer.metrics["meta_loss"]
        step, self._step = self._step, None
        assert step is not None
        weight_net_gradient = step.weight_net_gradient(gradient)
        for name, parameter in self.weight_net.named_parameters():
            parameter.grad = weight_net_gradient[name]
        optimizer.step()

    def _meta_gradient(self, stepped: State, meta: Batch, joint: bool = False) -> Answer:
        params = {name.removeprefix("model."): value.to(self.device) for name, value in stepped.items()}
        gradient, loss = meta_gradient(self.model, params, self._on_device(*meta), joint)
        return Answer({f"model.{name}": value for name, value in gradient.items()}, {"meta_loss": loss})

    def _on_device(self, images: Tensor, labels: Tensor) -> Batch:
        """Prepare a batch that Lightning did not move: support and meta set may lie on the CPU."""
        return self.prepare(images), labels.to(self.device)

    def _stack_on_device(self, images: Tensor, labels: Tensor) -> Batch:
        """Prepare the batches of several clients: images (G, B, ...) and labels (G, B)."""
        return self.prepare(images.flatten(0, 1)).view(*images.shape), labels.to(self.device)

    def _weight_net_state(self) -> State:
        return {name: value for name, value in self.shared_state().items() if name.startswith("weight_net.")}

    # Server

    def answer(self, question: Question, server: ServerSession) -> Answer:
        """Return the meta gradient g at the virtual weights of a client.

        Args:
            question: Holds w_hat.
            server: Has the meta set.
        """
        with training_mode(self.model):  # as clients train
            return self._meta_gradient(question.payload, server.meta_for(question))

    def answers(self, questions: Sequence[Question], server: ServerSession) -> list[Answer]:
        """Return the meta gradients of several clients, computed at once.

        Args:
            questions: Hold w_hat.
            server: Has the meta set.
        """
        params = stacked([question.payload for question in questions], "model.", self.device)
        images, labels = (torch.stack(part) for part in zip(*map(server.meta_for, questions), strict=True))
        with training_mode(self.model):
            gradients, losses = meta_gradients(self.model, params, *self._stack_on_device(images, labels))
        rows = zip(unstacked(gradients, "model."), losses, strict=True)
        return [Answer(gradient, {"meta_loss": loss}) for gradient, loss in rows]

    @property
    def _joint(self) -> bool:
        """Whether the batches of several devices are one."""
        return self.session is None and self.trainer.world_size > 1
