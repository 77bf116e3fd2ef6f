"""FedNH (Dai et al., *Tackling Data Heterogeneity in Federated Learning with Class Prototypes*, AAAI 2023)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.models import inputs_of
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ServerSession

MEANS, COUNTS = "class_means", "class_counts"
SPREADING_STEPS, SPREADING_LR, SHARPNESS = 1000, 0.3, 10.0
"""Options of :func:`spread`; the larger the sharpness, the more the nearest other prototype dominates."""
TOLERANCE = 1e-3
"""How far rounding may move the length of a mean direction from 1."""


class PrototypeHead(nn.Module):
    """Scaled cosines between the features and one prototype per class, a unit vector that is not trained.

    Args:
        prototypes: Unit rows, shape (C, D).
        scale: Initial value of the learned scale of the cosines.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, C)."""
        return self.scale * functional.normalize(features, eps=1e-12) @ self.prototypes.T


class FedNH(FederatedModule):
    """FedAvg with class prototypes instead of the last linear layer, which only the server moves.

    The logits are the cosines between features and prototypes times a learned scale. The prototypes start far apart and
    are fixed at the clients. After training, a client sends for each of its classes the direction of the mean of its
    normalised features, and the number of its examples. The server averages the directions, weighted by these counts,
    and moves each prototype towards the average of its class; ``smoothing`` is the share of the prototype that is kept.
    The prototype of a class that no client of the round holds does not change. The rest of the model is averaged.

    Class counts and mean features leave the client: 4 C D + 8 C bytes, in place of 4 C (D + 1) for the linear layer.
    The client receives the prototypes, 4 C D bytes. A round costs one more pass over the client's examples. With
    ``smoothing`` 1, and in a plain Trainer, the prototypes keep their initial values.

    The authors average models without weights; here the run's ``aggregation`` determines the weights. The scale has no
    weight decay. The authors start it at 1 for small networks, which then train very slowly; 20 suits ResNets, 10 a
    small CNN.

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
        smoothing: Share of a prototype that is kept in a round, in [0, 1].
        scale: Initial value of the learned factor of the cosines.
        max_grad_norm: Longer gradients of a step are shortened to this length; null: none are.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    returned: ClassVar[Mapping[str, Reduction]] = {MEANS: "sum", COUNTS: "sum"}

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
        smoothing: float = 0.9,
        scale: float = 20.0,
        max_grad_norm: float | None = 10.0,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("smoothing", smoothing, least=0)
        if smoothing > 1:
            raise ValueError(f"Expected `smoothing` to be a number of at most 1, got {smoothing}.")
        require_range("scale", scale, above=0)
        if max_grad_norm is not None:
            require_range("max_grad_norm", max_grad_norm, above=0)
        self._head = self.replace_classifier(
            lambda layer: PrototypeHead(first_prototypes(num_classes, layer.in_features), scale)
        )

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(
            revealed="class counts and mean features per class",
            work="client: one more pass over its examples",
        )

    @property
    def head(self) -> PrototypeHead:
        """The head that computes the logits."""
        head = self.get_submodule(self._head)
        assert isinstance(head, PrototypeHead)
        return head

    # Client

    def configure_optimizers(self) -> Any:
        """Return the local optimizer, without weight decay for the scale."""
        optimizer, scale = super().configure_optimizers(), self.head.scale
        (group,) = optimizer.param_groups
        group["params"] = [parameter for parameter in group["params"] if parameter is not scale]
        optimizer.add_param_group({"params": [scale], "weight_decay": 0.0})
        return optimizer

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients as the Trainer is configured, or else to ``max_grad_norm``."""
        if gradient_clip_val is None and self.hparams["max_grad_norm"] is not None:
            gradient_clip_val, gradient_clip_algorithm = self.hparams["max_grad_norm"], "norm"
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def client_payload(self) -> State:
        """Return the trained model without the prototypes, plus the mean directions and the class counts."""
        session = self.session
        assert session is not None
        num_classes, size = self.head.prototypes.shape
        sums = torch.zeros(num_classes, size, dtype=sent_type(self.head.prototypes), device=self.device)
        was_training = self.training
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for images, labels in session.data.plain_batches():
                features = inputs_of(self.head, self.model, self.prepare(images)).to(sums.dtype)
                sums.index_add_(0, labels.to(self.device), functional.normalize(features, eps=1e-12))
        self.train(was_training)
        payload = super().client_payload()
        del payload[f"{self._head}.prototypes"]
        counts = session.data.class_counts(num_classes).to(self.device)
        return {**payload, MEANS: functional.normalize(sums, eps=1e-12), COUNTS: counts}

    # Server

    def expected_payload(self, sent: State) -> State:
        """Return the model without the prototypes, plus mean directions and class counts."""
        payload = super().expected_payload(sent)
        prototypes = payload.pop(f"{self._head}.prototypes")
        counts = torch.zeros(len(prototypes), dtype=torch.int64, device=prototypes.device)
        return {**payload, MEANS: torch.zeros_like(prototypes, dtype=sent_type(prototypes)), COUNTS: counts}

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the payload, with the mean directions times the class counts, in float64 for the sum.

        Raises:
            ValueError: If the counts do not add up to the client's examples, or a direction is not of length 1. A
                direction may be 0, and must be 0 for a class that the client does not hold.
        """
        counts, means = result.payload[COUNTS].cpu(), result.payload[MEANS].cpu().double()
        if (counts < 0).any():
            raise ValueError(f"its {COUNTS} are below 0")
        if (total := sum(counts.tolist())) != result.num_examples:
            raise ValueError(f"its {COUNTS} add up to {total}, not to its {result.num_examples} examples")
        lengths = means.norm(dim=1)
        if ((lengths != 0) & ~((lengths - 1).abs() <= TOLERANCE)).any():
            raise ValueError(f"its {MEANS} are not of length 1")
        if lengths[counts == 0].any():
            raise ValueError(f"its {MEANS} are of classes that it does not hold")
        return {**result.payload, MEANS: counts[:, None] * means}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, and update the prototypes."""
        name = f"{self._head}.prototypes"
        moved = moved_prototypes(state[name], reduced[MEANS], self.hparams["smoothing"])
        return {**super().server_step(state, reduced, server), name: moved}


def sent_type(prototypes: Tensor) -> torch.dtype:
    """Return the type in which mean directions are sent: that of the prototypes, but at least float32."""
    return torch.promote_types(prototypes.dtype, torch.float32)


def moved_prototypes(prototypes: Tensor, sums: Tensor, smoothing: float) -> Tensor:
    """Return ``P_c <- normalise(smoothing P_c + (1 - smoothing) a_c)``, where a_c is the direction of the class's sum.

    Args:
        prototypes: Unit rows P_c, shape (C, D).
        sums: Mean directions summed over the clients, weighted by class counts, shape (C, D); a row of 0 leaves its
            prototype unchanged.
        smoothing: In [0, 1]; 1 leaves all prototypes unchanged.

    Returns:
        Unit rows, shape (C, D).

    Example:
        >>> moved_prototypes(torch.eye(2), torch.tensor([[0.0, 5.0], [0.0, 0.0]]), 0.5)
        tensor([[0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    if smoothing == 1:
        return prototypes
    exact, sums = prototypes.cpu().double(), sums.cpu().double()
    moved = smoothing * exact + (1 - smoothing) * functional.normalize(sums, eps=1e-12)
    moves = (sums.norm(dim=1) > 1e-12) & (moved.norm(dim=1) > 1e-12)  # opposite directions may cancel
    return torch.where(moves[:, None], functional.normalize(moved), exact).to(prototypes)


def first_prototypes(num_classes: int, size: int) -> Tensor:
    """Draw prototypes that are far apart: orthogonal if there are at most D classes, else spread by :func:`spread`.

    Args:
        num_classes: Number of classes C.
        size: Size D of the features.

    Returns:
        Unit rows, shape (C, D).
    """
    drawn = torch.randn(num_classes, size)
    if num_classes > size:
        return spread(functional.normalize(drawn))
    columns: Tensor = torch.linalg.qr(drawn.T).Q
    return columns.T.contiguous()


def spread(prototypes: Tensor) -> Tensor:
    """Move unit vectors apart by gradient descent on the log-sum-exp of each one's cosines with the others.

    Args:
        prototypes: Unit rows, shape (C, D).

    Returns:
        Unit rows, shape (C, D).
    """
    itself = torch.eye(len(prototypes), dtype=torch.bool, device=prototypes.device)
    for step in range(SPREADING_STEPS):
        weights = (SHARPNESS * prototypes @ prototypes.T).masked_fill(itself, -torch.inf).softmax(1)
        lr = SPREADING_LR * (1 - step / SPREADING_STEPS)
        prototypes = functional.normalize(prototypes - lr * (weights + weights.T) @ prototypes)
    return prototypes
