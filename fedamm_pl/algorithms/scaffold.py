"""SCAFFOLD (Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020)."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.federation.aggregation import WeightedAverage
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ServerSession

CONTROL = "control."


class Scaffold(FederatedModule):
    """FedAvg whose steps are corrected by control variates c - c_k, estimates of how far a client's gradient is off.

    Option II of the paper: after K steps c_k becomes ``c_k - c + (w - w_k) / (K lr)``, and the server moves c by
    ``|S| / N`` times the mean of the changes of the |S| clients of the round out of N. Derived for plain SGD, so the momentum
    is 0; weight decay counts as a part of the gradient. The server's step size is 1. The control variates double the bytes
    each way; a client keeps c_k to itself between its rounds, one more model in memory for each client that has taken part.

    In a plain Trainer there are no other clients, and it is FedAvg without momentum.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: 0; there is no other.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info)
        if momentum != 0:
            raise ValueError(
                f"Expected `momentum` to be 0 for Scaffold, got {momentum}: its control variates assume plain SGD."
            )

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and c, which is 0 before the first round."""
        sent = super().broadcast(state, server)
        return {
            **sent,
            **{CONTROL + name: state.get(CONTROL + name, torch.zeros_like(sent[name])) for name in self._trained()},
        }

    def expected_payload(self, sent: State) -> State:
        """Return the model and changes of c_k, compared with none."""
        changes = {CONTROL + name: torch.zeros_like(sent[name]) for name in self._trained()}
        return {**super().expected_payload(sent), **changes}

    def on_train_start(self) -> None:
        """Compute the correction c - c_k."""
        super().on_train_start()
        self._correction = {}
        if self.session is not None:
            sent, kept = self.session.task.payload, self.session.kept
            self._correction = {
                name: (
                    sent[CONTROL + name] - kept[name].to(sent[CONTROL + name].device) if kept else sent[CONTROL + name]
                ).to(self.device)
                for name in self._trained()
            }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct the gradients."""
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and name in self._correction:
                parameter.grad += self._correction[name]

    def client_payload(self) -> State:
        """Return the trained model and the change of c_k, and keep c_k."""
        payload, session = super().client_payload(), self.session
        assert session is not None
        scale = 1 / (self.trainer.global_step * self.hparams["lr"])
        changes, kept = {}, {}
        for name in self._trained():
            # c_k+ - c_k = -c + (w - w_k) / (K lr)
            sent = session.task.payload
            changes[CONTROL + name] = (sent[name].to(self.device) - payload[name]) * scale - sent[CONTROL + name].to(
                self.device
            )
            before = session.kept.get(name)
            kept[name] = changes[CONTROL + name] + (0 if before is None else before.to(self.device))
        session.kept = kept
        return {**payload, **changes}

    def server_update(self, state: State, results: Iterable[ClientResult], server: ServerSession) -> State:
        """Average the models as the run does, and move c by the mean change, scaled by the share of clients."""
        changes, num_results = WeightedAverage(), 0

        def models() -> Iterator[ClientResult]:
            nonlocal num_results
            for result in results:
                num_results += 1
                changes.add({name: value for name, value in result.payload.items() if name.startswith(CONTROL)}, 1.0)
                yield result

        new = super().server_update({}, models(), server)
        share = num_results / server.num_clients
        for name, change in changes.compute().items():
            new[name] = state[name] + share * change if name in state else share * change
        return {**state, **new}

    def _trained(self) -> list[str]:
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and name.startswith(self.shared)
        ]
