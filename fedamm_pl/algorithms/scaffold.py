"""SCAFFOLD (Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.protocol.classifier import LocalOptimizer
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ServerSession

CONTROL = "control."


class Scaffold(FederatedModule):
    """FedAvg whose steps are corrected by control variates c - c_k, which estimate the deviation of a client's gradient.

    This is option II of the paper: after K steps c_k becomes ``c_k - c + (w - w_k) / (K lr)``. The server changes c by
    ``|S| / N`` times the average of the changes of the |S| clients of the round, out of N clients. The changes are
    averaged with the same weights as the models (the paper weights both uniformly, as ``aggregation: uniform`` does),
    so c is the gradient of the objective that the average minimises. The method was derived for plain SGD, so the
    momentum is 0; weight decay counts as a part of the gradient. The server's step size is 1. The control variates
    double the bytes in each direction. A client keeps c_k to itself between its rounds: one more model in memory for
    each client that has taken part.

    In a plain Trainer there are no other clients, and it is FedAvg without momentum.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Must be 0.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {CONTROL: "average"}

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
        local_optimizer: LocalOptimizer = "sgd",
        rho: float | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if momentum != 0:
            raise ValueError(
                f"Expected `momentum` to be 0 for Scaffold, got {momentum}: its control variates assume plain SGD."
            )

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            revealed="the change of its control variate",
            client_state="a control variate, as large as the model",
            server_state="a control variate, as large as the model",
            work="client: a gradient correction per step",
        )

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and c, which is 0 before the first round."""
        sent = super().broadcast(state, server)
        return {
            **sent,
            **{CONTROL + name: state.get(CONTROL + name, torch.zeros_like(sent[name])) for name in self._trained()},
        }

    def on_train_start(self) -> None:
        """Compute the correction c - c_k."""
        super().on_train_start()
        self._correction = {}
        if self.session is not None:
            sent, kept = self.session.payload, self.session.kept
            self._correction = {
                name: (
                    sent[CONTROL + name] - kept[name].to(sent[CONTROL + name].device) if kept else sent[CONTROL + name]
                ).to(self.device)
                for name in self._trained()
            }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the gradients of a step, but not in the first pass of a sharpness-aware step."""
        if self.looks_ahead:
            return
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and name in self._correction:
                parameter.grad += self._correction[name]

    def client_payload(self) -> State:
        """Return the trained model and the change of c_k, and keep the new c_k."""
        payload, session = super().client_payload(), self.session
        assert session is not None
        scale = 1 / (session.num_steps * self.local_lr)
        changes, kept = {}, {}
        sent = session.payload
        for name in self._trained():
            # c_k+ - c_k = -c + (w - w_k) / (K lr)
            changes[CONTROL + name] = (sent[name].to(self.device) - payload[name]) * scale - sent[CONTROL + name].to(
                self.device
            )
            before = session.kept.get(name)
            kept[name] = changes[CONTROL + name] + (0 if before is None else before.to(self.device))
        session.kept = kept
        return {**payload, **changes}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, and add the average change to c, scaled by the share of clients that took part."""
        share = server.num_results / server.num_clients
        controls = {name: state.get(name, 0) + share * reduced[name] for name in reduced if name.startswith(CONTROL)}
        return {**super().server_step(state, reduced, server), **controls}

    def _trained(self) -> list[str]:
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and name.startswith(self.shared)
        ]
