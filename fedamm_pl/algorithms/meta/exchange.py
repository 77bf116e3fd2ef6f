"""``MetaExchange``: both sides of FedAMM's exchange of w_hat and the meta gradient, for one or several clients."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import meta_gradient, training_mode, virtual_step
from fedamm_pl.algorithms.meta.classes import KnowsClasses
from fedamm_pl.algorithms.meta.suited import fault, suited
from fedamm_pl.algorithms.meta.together import VirtualSteps, expanded, meta_gradients, stacked, unstacked, virtual_steps
from fedamm_pl.algorithms.meta.virtual_steps import VirtualStep
from fedamm_pl.algorithms.meta.weighing import Weighing
from fedamm_pl.data.client import Batch
from fedamm_pl.models import WeightNet
from fedamm_pl.models.masked import padded
from fedamm_pl.protocol.messages import Answer, Question, State
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ClientSession, ServerSession

log = logging.getLogger(__name__)
Exchange = Literal["full", "bfloat16", "head"]


class MetaExchange(KnowsClasses):
    """A module with a weight net, whose clients take the virtual step and the meta step, and whose server has the meta gradient.

    ``full`` sends w_hat and g unchanged. ``bfloat16`` sends w_hat - w, as the server knows w, and g, both rounded to
    bfloat16. This halves the bytes, and the rounding error of a small difference is far smaller than that of w_hat
    would be. ``head`` sends only the last linear layer of w_hat and of g: for the other layers, the server uses the
    parameters that it has sent, and g is taken as 0.

    Abstract: a subclass must create ``weight_net``, have the options ``meta_lr``, ``meta_update``, ``differentiation``
    and ``exchange``, and implement the training.
    """

    shared = ("model.", "weight_net.")
    uses_meta_set = True

    weight_net: WeightNet
    exchanged_head: str
    _step: VirtualStep | None = None  # the virtual step that waits for its meta gradient
    _steps: VirtualSteps | None = None  # the same for several clients
    _meta_loss: Tensor | None = None
    _returned_weight_net: State = {}  # noqa: RUF012  replaced, never changed

    def check_exchange(self) -> None:
        """Check the options of the exchange, and find the layer that is exchanged with ``exchange: head``.

        Raises:
            ValueError: If an option is out of range, or there is no such layer.
        """
        exchange = self.hparams["exchange"]
        if exchange not in get_args(Exchange):
            raise ValueError(f"Expected `exchange` to be full, bfloat16 or head, got {exchange!r}.")
        self.exchanged_head = self.head_name() if exchange == "head" else ""
        if exchange == "head" and not self.get_parameter(f"{self.exchanged_head}.weight").requires_grad:
            raise ValueError("Expected `model` to train its last linear layer for `exchange` head, got it frozen.")

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        synchronous, interval = self.asks_in_fit, self.hparams["meta_interval"]
        often = ("at each step" if interval == 1 else f"every {interval} steps") if synchronous else "once per round"
        part = "its last layer" if self.exchanged_head else "its model"
        return Privileges(
            server="balanced labelled images"
            + ("; the class counts of all clients together" if self.sends_counts else ""),
            revealed=f"{part} after a virtual step on one of its batches, {often}; its weight net; sums per class for figures",
            work=f"client: virtual step and weight-net gradient, {often}; server: gradient on its images for each virtual step",
        )

    def check(self, batch: Batch) -> None:
        """Check whether the differentiation works for the network, and warn if another one is used instead."""
        with training_mode(self.model):
            self._examine(self._on_device(*batch))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _examine(self, batch: Batch) -> None:
        wanted = self.hparams["differentiation"]
        way, reason = suited(self.model, batch, wanted, anew=True)
        if reason:
            name = type(self.model).__name__
            rank_zero_only(log.warning)(
                "differentiation %s is not right for %s (%s): %s is taken instead", wanted, name, reason, way
            )

    # Client

    @property
    def asks_in_fit(self) -> bool:
        """Whether the updates of the weight net are synchronous."""
        return bool(self.hparams["meta_update"] == "synchronous")

    def question(self, session: ClientSession) -> State | None:
        """If asynchronous, take the virtual step of the round, and ask for the meta gradient at w_hat."""
        self._meta_loss = None
        if self.asks_in_fit:
            return None
        self.learn_classes(session)
        return self._sent(self._virtual_step(self._on_device(*session.support())), session.payload)

    def take_answer(self, answer: Answer) -> None:
        """If asynchronous, take the round's meta step; the new weight net is returned, but not used in training."""
        received = self._weight_net_state()
        self._meta_step(answer, self.sgd(self.weight_net, self.hparams["meta_lr"]))
        self._returned_weight_net = self._weight_net_state()
        self.load_state_dict(received, strict=False)
        if self.session is not None and self._meta_loss is not None:
            self.session.metrics["meta_loss"], self._meta_loss = self._meta_loss, None

    def questions(self, sessions: Sequence[ClientSession]) -> list[State] | None:
        """If asynchronous, take the virtual steps of several clients at once; None if forward mode does not work."""
        images, labels, present, sizes = padded([session.support() for session in sessions])
        images, labels = self._stack_on_device(images, labels)
        present = None if present is None else present.to(self.device)
        largest = sizes.index(max(sizes))
        if fault(self.model, (images[largest], labels[largest]), "forward"):
            return None
        self._meta_loss = None
        lr = self.hparams["lr"] * sessions[0].broadcast.lr_factor  # the same for all clients
        weighing = self._stacked_weighing(sessions)
        self._steps = virtual_steps(self.model, self.weight_net, images, labels, present, lr, weighing)
        rows = zip(unstacked(self._steps.params, "model."), sessions, strict=True)
        return [self._sent(row, session.payload) for row, session in rows]

    def take_answers(self, sessions: Sequence[ClientSession], answers: Sequence[Answer]) -> Iterator[None]:
        """If asynchronous, take the meta steps of several clients at once."""
        steps, self._steps = self._steps, None
        assert steps is not None
        gradients = stacked([answer.payload for answer in answers], "model.", self.device)
        found = steps.weight_net_gradients(completed(gradients, steps.params, self._head))
        each = expanded(self.weight_net, len(sessions))
        updated = nn.ParameterList(value.detach().clone() for value in each.values())
        for parameter, gradient in zip(updated, found.values(), strict=True):
            parameter.grad = gradient
        self.sgd(updated, self.hparams["meta_lr"]).step()  # elementwise, so each client's step is independent
        rows = unstacked(dict(zip(each, updated, strict=True)), "weight_net.")
        for session, answer, row in zip(sessions, answers, rows, strict=True):
            self._returned_weight_net = {**self._weight_net_state(), **row}
            session.metrics["meta_loss"] = answer.metrics["meta_loss"]
            yield

    def _virtual_step(self, support: Batch) -> State:
        """Take a virtual step and return w_hat; the step is kept for :meth:`_meta_step`."""
        way, _ = suited(self.model, support, self.hparams["differentiation"])
        self._step = step = virtual_step(
            self.model, self.weight_net, support, self.local_lr, way, self._joint, self.weighing
        )
        return {f"model.{name}": value for name, value in step.params.items()}

    def _meta_step(self, answer: Answer, optimizer: torch.optim.Optimizer) -> None:
        """Update the weight net in place with the gradient that follows from the meta gradient.

        Args:
            answer: The meta gradient and the meta loss at w_hat.
            optimizer: The optimizer of the weight net.
        """
        gradient = {name.removeprefix("model."): value.to(self.device) for name, value in answer.payload.items()}
        self._meta_loss = answer.metrics["meta_loss"]
        step, self._step = self._step, None
        assert step is not None
        weight_net_gradient = step.weight_net_gradient(completed(gradient, step.params, self._head))
        for name, parameter in self.weight_net.named_parameters():
            parameter.grad = weight_net_gradient[name]
        optimizer.step()

    def _meta_gradient(self, stepped: State, meta: Batch, joint: bool = False) -> Answer:
        params = {name.removeprefix("model."): value.to(self.device) for name, value in stepped.items()}
        gradient, loss = meta_gradient(self.model, params, self._on_device(*meta), joint)
        return Answer({f"model.{name}": value for name, value in gradient.items()}, {"meta_loss": loss})

    def _on_device(self, images: Tensor, labels: Tensor) -> Batch:
        """Prepare a batch that Lightning has not moved: the support batch and the meta set may be on the CPU."""
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
            server: Provides the meta set.
        """
        with training_mode(self.model):  # as in the clients' training
            return self._returned(self._meta_gradient(self._received(question, server), server.meta_for(question)))

    def answers(self, questions: Sequence[Question], server: ServerSession) -> list[Answer]:
        """Return the meta gradients of several clients, computed at once.

        Args:
            questions: Hold the w_hat of the clients.
            server: Provides the meta set.
        """
        params = stacked([self._received(question, server) for question in questions], "model.", self.device)
        images, labels = (torch.stack(part) for part in zip(*map(server.meta_for, questions), strict=True))
        with training_mode(self.model):
            gradients, losses = meta_gradients(self.model, params, *self._stack_on_device(images, labels))
        rows = zip(unstacked(gradients, "model."), losses, strict=True)
        return [self._returned(Answer(gradient, {"meta_loss": loss})) for gradient, loss in rows]

    # The exchange

    def _stacked_weighing(self, sessions: Sequence[ClientSession]) -> Weighing:
        """Return the weighing of several clients, with class counts and families stacked to shape (G, C)."""
        found = []
        for session in sessions:
            self.learn_classes(session)
            found.append(self.weighing)

        def stack(parts: Sequence[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return torch.stack(known) if known else None

        counts, families = stack([one.class_counts for one in found]), stack([one.families for one in found])
        return replace(found[0], class_counts=counts, families=families)

    def _sent(self, stepped: State, received: Mapping[str, Tensor]) -> State:
        """Return the part of w_hat that the client sends, in the form in which it is sent.

        Args:
            stepped: The stepped parameters w_hat.
            received: The payload that the client received from the server.
        """
        match self.hparams["exchange"]:
            case "bfloat16":
                return {name: _rounded(value - received[name].to(value)) for name, value in stepped.items()}
            case "head":
                return {name: value for name, value in stepped.items() if name.startswith(f"{self.exchanged_head}.")}
        return stepped

    def _received(self, question: Question, server: ServerSession) -> State:
        """Return w_hat as reconstructed from a client's question, or the part of it that was sent."""
        if self.hparams["exchange"] != "bfloat16":
            return question.payload
        return {name: value.to(server.sent[name]) + server.sent[name] for name, value in question.payload.items()}

    def _returned(self, answer: Answer) -> Answer:
        """Return a meta gradient in the form in which the server sends it."""
        if self.hparams["exchange"] != "bfloat16":
            return answer
        return replace(answer, payload={name: _rounded(value) for name, value in answer.payload.items()})

    @property
    def _head(self) -> str:
        return self.exchanged_head.removeprefix("model.")

    @property
    def _joint(self) -> bool:
        """Whether the batches of several devices form one batch, as in a plain Trainer with several devices."""
        return self.session is None and self.trainer.world_size > 1


def _rounded(value: Tensor) -> Tensor:
    """Round floating-point tensors to bfloat16; complex ones stay as they are."""
    return value.bfloat16() if value.is_floating_point() else value


def completed(gradient: Mapping[str, Tensor], like: Mapping[str, Tensor], head: str) -> State:
    """Return a gradient in the types of the parameters, with 0 for parameters that are not exchanged.

    Args:
        gradient: The meta gradient in the server's answer.
        like: The parameters, by their names within the network.
        head: Name within the network of the only layer that is exchanged; empty if all layers are.

    Raises:
        ValueError: If an entry that is exchanged is missing.
    """
    if missing := sorted(name for name in like.keys() - gradient.keys() if not head or name.startswith(f"{head}.")):
        raise ValueError(
            f"Expected the answer to hold the meta gradient of all that was asked for, got none of {missing[0]}."
        )
    return {
        name: gradient[name].to(value.dtype) if name in gradient else torch.zeros_like(value)
        for name, value in like.items()
    }
