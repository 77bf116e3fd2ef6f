"""``DecoupledModule``: the base class of methods that re-train the classifier with class-balanced examples."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.feature_sums import require_counts
from fedamm_pl.algorithms.post_hoc import PostHocModule, When
from fedamm_pl.data.client import ClientData
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.privileges import NOTHING, Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession

Where = Literal["server", "clients"]
STAGE, COUNTS, ROWS = "stage2", "class_counts", "rows."


class DecoupledModule(PostHocModule):
    """FedAvg, then a second stage in which the features are unchanged and the classifier alone is trained.

    A subclass defines what is trained by :meth:`renewed`, :meth:`started` and :meth:`classifier`. At the server and at
    the clients, the network and its BatchNorm layers run in evaluation mode, and the steps are those of SGD with the
    momentum and weight decay of the first stage, whatever ``local_optimizer`` is.

    ``where: server``: the second stage runs before an evaluation, on the server's balanced images, with a learning rate
    that falls to 0 along a cosine. The next round continues from the model without it.

    ``where: clients``: in the rounds from ``stage2_start`` on, clients train the classifier instead of the whole
    network. A client draws its classes equally often; classes that it lacks are left out of its softmax. It sends the
    classifier and its class counts, and each row of the classifier is averaged over the clients in proportion to their
    examples of that class, whatever the run's aggregation and server optimizer are. A row whose class no client holds
    does not change.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its Nesterov momentum; 0 for none.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.
        where: Where the second stage takes place: server (on its balanced images) or clients.
        stage2_start: The round in which the second stage starts at the clients; a run that ends earlier is FedAvg.
        retrain_steps: Number of steps of the server.
        retrain_lr: Learning rate of the second stage; the run's ``lr_decay`` does not change it.
        calibrate: When the server does it: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range or does not apply to ``where``, there is no such network, or no linear
            layer gives its logits.
    """

    plain_steps = True  # of the first stage; the constructor sets it to False if the second runs at the clients

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
        local_optimizer: LocalOptimizer = "sgd",
        rho: float | None = None,
        where: Where = "server",
        stage2_start: int | None = None,
        retrain_steps: int = 100,
        retrain_lr: float = 0.1,
        calibrate: When = "evaluations",
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, calibrate
        )
        if where not in get_args(Where):
            raise ValueError(f"Expected `where` to be server or clients, got {where!r}.")
        if where == "clients" and (stage2_start is None or stage2_start < 1):
            raise ValueError(f"Expected `stage2_start` to be a round, 1 or later, where clients, got {stage2_start}.")
        if where == "server" and stage2_start is not None:
            raise ValueError(f"Expected `stage2_start` to be null where server, got {stage2_start}.")
        require_range("retrain_steps", retrain_steps, least=0)
        require_range("retrain_lr", retrain_lr, least=0)
        self.at_clients = where == "clients"
        self.uses_meta_set = self.uses_meta_set or not self.at_clients
        self.plain_steps = not self.at_clients

    @property
    def returned(self) -> Mapping[str, Reduction]:  # type: ignore[override]  # an option decides
        """How the server reduces the additional entries of the clients, including those of the second stage."""
        return {**super().returned, **({ROWS: "sum", COUNTS: "sum"} if self.at_clients else {})}

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            server=NOTHING if self.at_clients else "balanced labelled images",
            revealed="class counts" if self.at_clients else NOTHING,
            server_state="a flag that the second stage has begun" if self.at_clients else NOTHING,
            work=NOTHING if self.at_clients else f"server: {self.hparams['retrain_steps']} steps before an evaluation",
        )

    # What is trained

    def renewed(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the classifier with which the second stage starts, given the trained one; here the trained one."""
        return weight, bias

    def started(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Return the tensors that are trained, at their initial values; they share no memory with the classifier."""
        raise NotImplementedError

    def classifier(self, trained: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight (C, D) and bias (C,) that follow from the trained tensors.

        Args:
            trained: The tensors of :meth:`started` after some training.
            weight: The weight with which the second stage started.
            bias: The bias with which the second stage started.
        """
        raise NotImplementedError

    def _optimizer(self, trained: list[Tensor]) -> torch.optim.SGD:
        momentum, decay = self.hparams["momentum"], self.hparams["weight_decay"]
        lr = self.hparams["retrain_lr"]
        return torch.optim.SGD(trained, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)

    # Client

    @property
    def _second(self) -> bool:
        """Whether the client is in the second stage."""
        return self.session is not None and STAGE in self.session.payload

    def local_data(self, session: ClientSession) -> ClientData:
        """Return the client's data, with class-balanced sampling in the second stage."""
        data = super().local_data(session)
        return dataclasses.replace(data, balanced=True) if STAGE in session.payload else data

    def configure_optimizers(self) -> Any:
        """Return the optimizer; in the second stage it trains only the classifier."""
        if not self._second:
            return super().configure_optimizers()
        layer = self.get_submodule(self._head)
        self._start = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[operator]
        self._trained = [value.requires_grad_() for value in self.started(*self._start)]
        return self._optimizer(self._trained)

    def on_train_start(self) -> None:
        """In the second stage, set the network to evaluation mode and load the client's class counts."""
        super().on_train_start()
        if self.session is not None and self._second:
            self.model.eval()
            self._counts = self.session.data.class_counts(self.hparams["num_classes"]).to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the batch loss; in the second stage, on fixed features and over the client's classes only."""
        if not self._second:
            return super().training_step(batch, batch_idx)
        images, labels = batch
        with torch.no_grad():
            features, _ = features_and_logits(self.model, self.prepare(images))
        logits = functional.linear(features, *self.classifier(self._trained, *self._start))
        losses = example_losses(logits.masked_fill(self._counts == 0, -torch.inf), labels)
        self.track(len(labels), loss=losses.sum())
        return losses.mean()

    def client_payload(self) -> State:
        """Return the model; in the second stage the classifier and the class counts."""
        if not self._second:
            return super().client_payload()
        with torch.no_grad():
            trained = self.as_state(*self.classifier(self._trained, *self._start))
        return {**trained, COUNTS: self._counts}

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model; in the second stage also a flag, and in its first round with the renewed classifier."""
        sent = super().broadcast(state, server)
        if not self.at_clients or server.round_num < self.hparams["stage2_start"]:
            return sent
        mark = {STAGE: torch.ones((), dtype=torch.int64)}
        if STAGE in state:
            return {**sent, **mark}
        renewed = self.renewed(*self.classifier_of(state), server.generator(type(self).__name__))
        return {**sent, **_like(self.as_state(*renewed), sent), **mark}

    def expected_payload(self, sent: State) -> State:
        """Return the model; in the second stage the classifier and the class counts."""
        if STAGE not in sent:
            return super().expected_payload(sent)
        counts = torch.zeros(self.hparams["num_classes"], dtype=torch.int64)
        return {**{name: sent[name] for name in self._names()}, COUNTS: counts}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the payload; in the second stage, each row of the classifier times the examples of its class.

        Raises:
            ValueError: If the class counts do not match the client's number of examples.
        """
        if STAGE not in server.sent:
            return super().contribution(result, server)
        counts = result.payload[COUNTS].cpu()
        require_counts(counts.tolist(), result.num_examples)
        rows = {name: result.payload[name].cpu().double() for name in self._names()}
        return {COUNTS: counts, **{ROWS + name: value * _by_row(counts, value) for name, value in rows.items()}}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model; in the second stage also the averaged rows of classes that clients hold."""
        state = super().server_step(state, reduced, server)
        if STAGE not in server.sent:
            return state
        counts = reduced[COUNTS].cpu()
        made = {}
        for name in self._names():
            total = reduced[ROWS + name].cpu()
            held, before = _by_row(counts, total), server.sent[name]
            made[name] = torch.where((held > 0).to(before.device), (total / held.clamp(min=1)).to(before), before)
        return {**state, **made, STAGE: server.sent[STAGE]}

    def calibrates(self, last: bool) -> bool:
        """Return whether the server re-trains the classifier before this evaluation."""
        return not self.at_clients and self.hparams["retrain_steps"] > 0 and super().calibrates(last)

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return the classifier re-trained on the server's balanced images."""
        start = self.renewed(*self.classifier_of(state), server.generator(type(self).__name__))
        trained = [value.requires_grad_() for value in self.started(*start)]
        optimizer, num_steps = self._optimizer(trained), self.hparams["retrain_steps"]
        for step in range(num_steps):
            images, labels = server.meta(step)
            with torch.no_grad():
                features, _ = features_and_logits(self.model, self.prepare(images))
            with torch.enable_grad():
                logits = functional.linear(features.to(start[0]), *self.classifier(trained, *start))
                loss = functional.cross_entropy(logits, labels.to(logits.device))
                for value, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    value.grad = gradient
            optimizer.param_groups[0]["lr"] = (
                self.hparams["retrain_lr"] * (1 + math.cos(math.pi * step / num_steps)) / 2
            )
            optimizer.step()
        return self.as_state(*(value.detach() for value in self.classifier(trained, *start)))

    def _names(self) -> tuple[str, str]:
        return f"{self._head}.weight", f"{self._head}.bias"


def _by_row(counts: Tensor, value: Tensor) -> Tensor:
    """Reshape counts (C,) so that they multiply the rows of a weight (C, D) or the entries of a bias (C,)."""
    return counts.view(-1, *[1] * (value.ndim - 1))


def _like(state: State, other: State) -> State:
    """Convert tensors to the types and devices of the tensors with the same names."""
    return {name: value.to(other[name]) for name, value in state.items()}
