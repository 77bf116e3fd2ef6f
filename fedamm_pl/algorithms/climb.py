"""CLIMB (Shen et al., *An Agnostic Approach to Federated Learning with Class Imbalance*, ICLR 2022)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession

DUAL, LOSS = "dual", "global_loss"
MAX_DUAL = 100.0
"""Upper bound on a dual variable, as in the authors' program."""
MAX_LOSS = torch.finfo(torch.float32).max


class Climb(FederatedModule):
    """FedAvg under the constraint that no client's loss exceeds the mean over the clients by more than a tolerance.

    Each client has a dual variable lambda_k, which grows while the constraint is violated:
    ``lambda_k <- lambda_k + dual_lr (f_k - mean f - tolerance)``, kept in [0, 100]. Here f_k is the loss of the global
    model on the client's examples before it trains, and the mean is over the clients of the round. The server scales
    the client's update by ``1 + lambda_k - mean lambda``, with the values of lambda before the round and their mean
    over all clients.

    Differences from the authors' program: (1) It divides the dual step by the number K of clients, so ``dual_lr`` here
    is the authors' step size divided by K: 0.1 here corresponds to 2 there with 20 clients (the authors' default is 1).
    (2) Only the clients of a round measure their loss, which costs one pass over their examples and 8 bytes sent; the
    authors ask all K clients. So a client's variable changes only when the client is sampled, and the mean over few
    clients differs from that over all: the variable of a client that is sampled together with clients of low loss
    increases. (3) The authors take a dual step every fifth round. Here ``primal_rounds`` sets this; its default is 1,
    because with few clients per round the variables change rarely anyway. (4) The authors average the scaled updates
    uniformly; here the run's ``aggregation`` is used.

    With dual_lr = 0 it is FedAvg, bit for bit; in a plain Trainer it is FedAvg too.

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
        dual_lr: Step size of the dual ascent, the paper's divided by the number of clients.
        tolerance: How far a client's loss may exceed the mean.
        primal_rounds: Rounds per step of the dual ascent, which is taken at the end of the last of them.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {LOSS: "sum"}

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
        dual_lr: float = 0.1,
        tolerance: float = 0.1,
        primal_rounds: int = 1,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("dual_lr", dual_lr, least=0)
        require_range("tolerance", tolerance, least=0)
        require_range("primal_rounds", primal_rounds, least=1)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            revealed="the loss of the received model on its examples",
            server_state="one number per client",
            work="client: a pass over its examples",
        )

    def survey(self, session: ClientSession) -> State:
        """Measure the loss of the global model on the client's examples."""
        batches = session.data.plain_batches()
        losses = [example_losses(self(images), labels.to(self.device)) for images, labels in batches]
        loss = torch.cat(losses).mean().cpu()
        session.metrics["global_loss"] = loss.float()
        return {LOSS: loss.double()}

    def expected_payload(self, sent: State) -> State:
        """Return the model and the loss."""
        return {**super().expected_payload(sent), LOSS: torch.zeros((), dtype=torch.float64)}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Scale the client's update, and enter its loss in a table (2, K) of losses and of flags for measured ones.

        Raises:
            ValueError: If the loss is below 0 or beyond the range of float32.
        """
        client, loss = result.client_id, float(result.payload[LOSS])
        if loss < 0:
            raise ValueError(f"its {LOSS} is {loss:g}, a cross-entropy is 0 or more")
        if loss > MAX_LOSS:  # the scale that results from it would make every client's update overflow
            raise ValueError(f"its {LOSS} is {loss:g}, beyond the largest number of float32")
        dual = self._dual(server)
        scale = float((1 + dual - dual.mean())[client])
        trained = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        payload = {
            name: server.state[name].to(value.device).lerp(value, scale) if name in trained else value
            for name, value in result.payload.items()
        }
        measured = torch.zeros(2, server.num_clients, dtype=torch.float64)
        measured[:, client] = torch.tensor([loss, 1.0], dtype=torch.float64)
        return {**payload, LOSS: measured}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the average of the scaled updates, then update the dual variables if a dual step is due."""
        state = super().server_step(state, reduced, server)
        if server.round_num % self.hparams["primal_rounds"]:
            return {**state, DUAL: self._dual(server)}
        losses, measured = reduced[LOSS]
        clients = measured.nonzero().flatten()
        spread = losses[clients] - losses[clients].mean() - self.hparams["tolerance"]
        moved = self._dual(server).index_add(0, clients, self.hparams["dual_lr"] * spread)
        return {**state, DUAL: moved.clamp(0, MAX_DUAL)}

    def _dual(self, server: ServerSession) -> Tensor:
        return server.state.get(DUAL, torch.zeros(server.num_clients, dtype=torch.float64)).cpu()
