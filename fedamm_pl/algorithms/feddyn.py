"""FedDyn (Acar et al., *Federated Learning Based on Dynamic Regularization*, ICLR 2021)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.precision import at_least_float32
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ServerSession

MEAN_SIZE, MEAN, MEMORY = "mean_size", "mean.", "memory."


class FedDyn(FederatedModule):
    """FedAvg with a linear and a quadratic term in each client's loss, which align the clients' optima with the global optimum.

    Each client adds up its updates over all its rounds: ``l_k <- l_k + w_k - w``, starting at 0. It minimises the
    cross-entropy plus ``a_k <w, l_k> + a_k / 2 |w - w_received|^2``, where a_k is alpha times the mean number of
    examples of all K clients, divided by the client's own number. The server keeps h, the mean of these sums over all K
    clients, including clients that were never sampled: ``h <- h + (1 / K) sum_S (w_k - w)``. It sends ``mean + h``,
    where the mean is that of the trained models, not weighted by examples. The mean without h is evaluated and
    delivered. BatchNorm statistics are averaged as in FedAvg.

    No setting makes it equal to FedAvg: with alpha = 0 a client's steps are those of FedAvg, but h is still added. A
    client sends nothing extra and receives 8 bytes more, the mean number of examples. Each client stores one more
    model, and so does the server. a_k is limited to 1 / (2 lr), since the steps of a client with very few examples
    would diverge otherwise. The method was derived for plain SGD, so momentum is 0 by default. A robust aggregation
    replaces the mean. In a plain Trainer there are no other clients, and it is FedAvg with clipped gradients.

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
        alpha: Weight of the two terms.
        max_grad_norm: Gradients are clipped to this norm; null: no clipping.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {MEAN: "mean"}
    optimizable: ClassVar[bool] = False

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
        alpha: float = 0.01,
        max_grad_norm: float | None = 10.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("alpha", alpha, least=0)
        if max_grad_norm is not None:
            require_range("max_grad_norm", max_grad_norm, above=0)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            client_state="the sum of its updates (one model)",
            server_state="the mean of these sums (one model)",
            work="client: distance from the received model per step",
        )

    # Client

    def on_train_start(self) -> None:
        """Load the client's memory, and compute the weight of the two terms."""
        super().on_train_start()
        self._terms: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its received value, memory
        self._weight = 0.0
        if self.session is None:
            return
        mean_size, num_examples = float(self.session.payload[MEAN_SIZE]), self.session.data.num_examples
        self._weight = min(self.hparams["alpha"] * mean_size / num_examples, 1 / (2 * self.local_lr))
        for name, parameter in self._trained(remove_duplicate=True).items():
            received, kept = parameter.detach().clone(), self.session.kept.get(name)
            memory = torch.zeros_like(at_least_float32(received)) if kept is None else kept.to(self.device)
            self._terms.append((parameter, received, memory))

    def batch_loss(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the batch loss with both terms."""
        loss = super().batch_loss(losses, present)
        if self._weight == 0:
            return loss
        terms = [dynamic_term(now, received, memory) for now, received, memory in self._terms]
        return loss + self._weight * torch.stack(terms).sum()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as the Trainer is configured, or else to ``max_grad_norm``."""
        if gradient_clip_val is None and self.hparams["max_grad_norm"] is not None:
            gradient_clip_val, gradient_clip_algorithm = self.hparams["max_grad_norm"], "norm"
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def client_payload(self) -> State:
        """Return the trained model, and add its update to the client's memory."""
        assert self.session is not None
        names = self._trained(remove_duplicate=True)
        self.session.kept = {
            name: memory + (at_least_float32(now.detach()) - at_least_float32(received))
            for name, (now, received, memory) in zip(names, self._terms, strict=True)
        }
        return super().client_payload()

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model and the mean number of examples of all clients."""
        mean_size = self.known_counts().sum().double() / server.num_clients
        return {**super().broadcast(state, server), MEAN_SIZE: mean_size}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Mark the parameters for the unweighted mean; other entries of the model are averaged as in FedAvg."""
        trained = self._trained()
        return {MEAN + name if name in trained else name: value for name, value in result.payload.items()}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Update h, and add it to the mean of the models."""
        share = server.num_results / server.num_clients
        stepped: State = {}
        for name in self._trained():
            mean, last = at_least_float32(reduced[MEAN + name]), at_least_float32(state[name])
            memory = state.get(MEMORY + name, torch.zeros_like(last)) + share * (mean - last)
            stepped |= {name: (mean + memory).to(state[name]), MEMORY + name: memory}
        return {**state, **{name: value for name, value in reduced.items() if name in state}, **stepped}

    def deployed(self, state: State) -> State:
        """Return the mean of the models, without h."""
        shared = super().deployed(state)
        return {
            name: (at_least_float32(value) - state[MEMORY + name]).to(value) if MEMORY + name in state else value
            for name, value in shared.items()
        }

    def _trained(self, remove_duplicate: bool = False) -> dict[str, nn.Parameter]:
        """Return the trainable shared parameters; tied parameters appear under all their names, or under one."""
        return {
            name: parameter
            for name, parameter in self.named_parameters(remove_duplicate=remove_duplicate)
            if parameter.requires_grad and name.startswith(self.shared)
        }


def dynamic_term(now: Tensor, received: Tensor, memory: Tensor) -> Tensor:
    """Return ``<w, l> + |w - w_received|^2 / 2``, whose gradient is ``w - w_received + l``.

    Args:
        now: w, of any shape.
        received: Value of the parameter that the client received.
        memory: l, of the same shape.

    Example:
        >>> dynamic_term(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, -1.0]))
        tensor(7.)
    """
    return (now * memory + (now - received) ** 2 / 2).sum()
