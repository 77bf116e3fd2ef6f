"""FedNova (Wang et al., *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, NeurIPS 2020)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.protocol.classifier import LocalOptimizer
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ServerSession

NUM_STEPS = "num_steps"


def normalizer(num_steps: int, momentum: float) -> float:
    """Return ||a||_1, the total weight of a constant gradient in ``num_steps`` steps of torch's Nesterov SGD.

    Without momentum this is the number of steps tau. A gradient that is computed n steps before the end moves the model
    by ``1 + rho + ... + rho^n`` times its size, so the sum over the steps is
    ``(tau - rho^2 (1 - rho^tau) / (1 - rho)) / (1 - rho)``. (Wang et al. give the coefficient for heavy-ball momentum;
    this is the same derivation for Nesterov momentum.)

    Args:
        num_steps: Number tau of local steps.
        momentum: Momentum rho, in [0, 1).

    Example:
        >>> normalizer(7, 0.0), round(normalizer(2, 0.5), 12)  # 1.75 + 1.5
        (7.0, 3.25)
    """
    rest = 1 - momentum
    return (num_steps - momentum**2 * (1 - momentum**num_steps) / rest) / rest


class FedNova(FederatedModule):
    """FedAvg with updates divided by their amount of local work, then scaled by the average amount.

    The server computes ``w <- w + (sum_k p_k a_k) * sum_k p_k (w_k - w) / a_k``, where a_k is the ||a_k||_1 of the
    client's local steps, see :func:`normalizer`; BatchNorm statistics are averaged as in FedAvg. With equal numbers of
    steps it is FedAvg, up to rounding. Weight decay counts as a part of the gradient. A client sends 8 bytes more: its
    number of steps. The proximal term that the authors' program also offers is left out; for its server momentum use
    ``--federation.server_optimizer``.

    The options are those of :class:`FederatedModule`.

    Raises:
        ValueError: If an option is out of range, including a momentum of 1 or more.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {NUM_STEPS: "average"}

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
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if momentum >= 1:
            raise ValueError(f"Expected `momentum` to be below 1 for FedNova, got {momentum}.")

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(revealed="the number of its local steps")

    def expected_payload(self, sent: State) -> State:
        """Return the model and the number of steps."""
        return {**super().expected_payload(sent), NUM_STEPS: torch.zeros((), dtype=torch.int64)}

    def client_payload(self) -> State:
        """Return the trained model and the number of steps."""
        assert self.session is not None
        return {**super().client_payload(), NUM_STEPS: torch.tensor(self.session.num_steps)}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Divide the update by the client's amount of work, and add this amount as an entry to be averaged.

        Raises:
            ValueError: If there are no steps, or more steps than examples in all local epochs.
        """
        num_steps, most = int(result.payload[NUM_STEPS]), server.local_epochs * result.num_examples
        if not 1 <= num_steps <= most:
            raise ValueError(f"its {NUM_STEPS} is {num_steps}, expected 1 to {most}")
        work = normalizer(num_steps, self.hparams["momentum"])
        payload: State = {NUM_STEPS: torch.tensor(work, dtype=torch.float64)}
        for name, value in result.payload.items():
            if name != NUM_STEPS:
                trained = name in self._trained
                payload[name] = (value - server.state[name].to(value.device)) / work if trained else value
        return payload

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Step along the mean normalised update, scaled by the average work; server optimizers get it as average."""
        work = float(reduced[NUM_STEPS])
        stepped = {name: state[name].to(reduced[name].device) + work * reduced[name] for name in self._trained}
        return super().server_step(state, {**reduced, **stepped}, server)

    @property
    def _trained(self) -> set[str]:
        return {name for name, _ in self.named_parameters(remove_duplicate=False) if name.startswith(self.shared)}
