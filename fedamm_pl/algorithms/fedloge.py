"""FedLoGe (Xiao et al., *Joint Local and Generic Federated Learning under Long-tailed Data*, ICLR 2024)."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms.fedrod import zeroed
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.seeding import numpy_generator

Rows = npt.NDArray[np.float64]
LENGTH, SIMPLEX_LR = 0.1, 1e-4
"""Length of the rows of the simplex, and step size of the optimisation that gives them this length."""


class FedLoGe(FederatedModule):
    """FedAvg whose features are trained towards a fixed sparse simplex, and whose last layer is trained in parallel and then normalised.

    Three heads take the same features z. Only the fixed head M trains the layers below, by cross-entropy on M z. The
    network's last linear layer (A, a) is trained by cross-entropy on A stop(z) + a and averaged with the model. The
    third head (L, l) is trained in the same way, but it stays at the client and is never sent. The length of a row of A
    reflects how frequent its class is among all clients, that of a row of L how frequent it is at the client.

    In the model that is evaluated and delivered, the rows of A are scaled to their mean length; the bias does not
    change. ``personal/acc`` in the rows of a run is the accuracy of the client's own logits
    ``A_c |L_c| . z + l_c + g_c`` over the classes that the client holds, where A has the scaled rows and g are the
    logits of the delivered model. Test images are weighted by the client's class counts, see :class:`FedRoD`. The costs
    are the same as in FedRoD.

    M depends only on the options. It is a simplex equiangular tight frame in a random orientation, in which a share
    ``sparsity`` of the entries of each row is set to 0. The other entries are optimised for rows of length 0.1 that are
    as far from each other as possible. M is computed before the first fit, within seconds, and never sent, so a client
    receives and sends the same as in FedAvg. A client keeps C (D + 1) numbers. In a plain Trainer the last layer stays
    as it was trained.

    With ``sparsity`` and ``simplex_steps`` 0, M is the simplex of FedETF without its projection. The authors scale the
    rows of the last layer to length 1.7; here they are scaled to their mean length. M has no bias. L starts at 0.

    Args:
        num_classes: Number of classes C, at most D, the size of the features.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its Nesterov momentum; 0 for none.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.
        sparsity: Fraction of the entries of each row of M that are 0, in [0, 1); at least one entry is not.
        simplex_steps: Adam steps that optimise the other entries.
        simplex_seed: Seed of M.
        realign: Whether the rows of the last layer are scaled to equal length.

    Raises:
        ValueError: If an option is out of range, there are more classes than features, or there is no such network.
    """

    uses_features = True
    personal = ("own.",)

    simplex: Tensor
    """M during a fit, shape (C, D)."""

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
        sparsity: float = 0.6,
        simplex_steps: int = 10_000,
        simplex_seed: int = 0,
        realign: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("num_classes", num_classes, least=2)
        require_range("sparsity", sparsity, least=0)
        if sparsity >= 1:
            raise ValueError(f"Expected `sparsity` to be a number below 1, got {sparsity}.")
        require_range("simplex_steps", simplex_steps, least=0)
        require_range("simplex_seed", simplex_seed, least=0)
        self._head = self.head_name()
        size = self.head.in_features
        if num_classes > size:
            raise ValueError(
                f"Expected `model` to have {num_classes} features or more for the simplex of {num_classes} classes, got {size}."
            )
        self.own = zeroed(nn.Linear(size, num_classes))
        self.register_buffer("simplex", torch.zeros(num_classes, size), persistent=False)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        return Privileges(client_state="its own head", work="client: two more heads at each step")

    @property
    def head(self) -> nn.Linear:
        """The network's last linear layer (A, a)."""
        head = self.get_submodule(self._head)
        assert isinstance(head, nn.Linear)
        return head

    # Client

    def on_train_start(self) -> None:
        """Set the fixed head to the simplex."""
        super().on_train_start()
        options = self.hparams
        num_classes, size = self.simplex.shape
        made = sparse_simplex(num_classes, size, options["sparsity"], options["simplex_steps"], options["simplex_seed"])
        self.simplex = made.to(self.head.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the sum of the losses of the three heads; each loss trains only its own parameters."""
        labels = batch[1]
        features, _ = features_and_logits(self.model, self.prepare(batch[0]))
        losses = self.objective_of(functional.linear(features, self.simplex), labels)
        auxiliary, own = (example_losses(head(features.detach()), labels) for head in (self.head, self.own))
        self.track(len(labels), loss=losses.sum(), auxiliary_loss=auxiliary.sum(), personal_loss=own.sum())
        return self.batch_loss(losses) + auxiliary.mean() + own.mean()

    def configure_optimizers(self) -> Any:
        """Return the local optimizer, which also trains the client's own head."""
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": list(self.own.parameters())})
        return optimizer

    # Evaluation

    def deployed(self, state: State) -> State:
        """Return the model; with ``realign``, the rows of its last layer are scaled to equal length."""
        shared, name = super().deployed(state), f"{self._head}.weight"
        return {**shared, name: even_rows(shared[name])} if self.hparams["realign"] else shared

    def personal_logits(self, features: Tensor, logits: Tensor, class_counts: Tensor) -> Tensor:
        """Return the logits of the client's own head, realigned, plus the delivered ones, over the client's classes."""
        weight = self.own.weight
        if self.hparams["realign"]:
            weight = self.head.weight * weight.norm(dim=1, keepdim=True)
        both = functional.linear(features, weight, self.own.bias) + logits
        return both.masked_fill(class_counts == 0, -torch.inf)


def even_rows(weight: Tensor) -> Tensor:
    """Scale the rows of a matrix to their mean length; a row of zeros does not change.

    Args:
        weight: Shape (C, D).

    Returns:
        Shape (C, D).

    Example:
        >>> even_rows(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[1.8000, 2.4000],
                [0.0000, 3.0000]])
    """
    exact = weight.cpu().double()
    lengths = exact.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, exact * lengths.mean() / lengths, exact).to(weight)


@cache
def sparse_simplex(num_classes: int, size: int, sparsity: float, num_steps: int, seed: int) -> Tensor:
    """Return the fixed head: ``sqrt(C / (C - 1)) (I - 1/C) P``, made sparse and optimised along :func:`simplex_slope`.

    Args:
        num_classes: Number of classes C, 2 or more.
        size: Size D of the features, C or more.
        sparsity: Share of the entries of each row that are 0.
        num_steps: Number of Adam steps, of size 1e-4.
        seed: Seed of the orthonormal rows P and of the positions of the zeros.

    Returns:
        Shape (C, D), in float64, on the CPU.
    """
    generator = numpy_generator(seed, "simplex")
    rows = np.linalg.qr(generator.standard_normal((size, num_classes)))[0].T
    order = generator.random((num_classes, size)).argsort(axis=1).argsort(axis=1)
    mask = order >= min(round(sparsity * size), size - 1)
    rows = (num_classes / (num_classes - 1)) ** 0.5 * (rows - rows.mean(axis=0)) * mask
    first, second = np.zeros_like(rows), np.zeros_like(rows)
    for step in range(1, num_steps + 1):
        slope = simplex_slope(rows) * mask
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        rows = rows - SIMPLEX_LR * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return torch.from_numpy(rows)


def simplex_slope(rows: Rows) -> Rows:
    """Return the gradient of ``sum_c (|m_c| - 0.1)^2 - mean_c arccos(max over j != c of cos(m_c, m_j))``.

    Args:
        rows: Rows m_c, shape (C, D).

    Returns:
        Shape (C, D).
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    directions = rows / lengths
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.argmax(axis=1)
    others, cosine = directions[nearest], cosines.max(axis=1)[:, None]
    steepness = 1 / (len(rows) * np.sqrt((1 - cosine**2).clip(min=1e-9)))  # bounded for opposite or equal rows
    slope: Rows = 2 * (lengths - LENGTH) * directions + steepness * (others - cosine * directions) / lengths
    np.add.at(slope, nearest, steepness * (directions - cosine * others) / lengths[nearest])
    return slope
