"""tau-normalised classifier (Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020)."""

import logging

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.post_hoc import PostHocModule, When
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.privileges import NOTHING, Privileges
from fedamm_pl.protocol.session import ServerSession

log = logging.getLogger(__name__)

GRID = tuple(step / 10 for step in range(21))
"""Values of tau from which the server chooses, as in the paper."""
DRAWS = 10
"""Number of draws of the balanced images on which the values of tau are compared."""


class TauNormalized(PostHocModule):
    """FedAvg whose classifier is evaluated with the rows ``W_c / |W_c|^tau`` and without its bias: rare classes have short rows.

    Training is FedAvg's, bit for bit. With tau = 0 the model is FedAvg's without the bias; with tau = 1 all rows have
    length 1. Nothing is sent or trained. The paper chooses tau on a validation set. Here it is fixed or, with
    ``tau: null``, the one of 0, 0.1, ..., 2 with the best accuracy on the server's balanced images (the smallest of
    equally good ones). In a plain Trainer it is FedAvg.

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
        tau: The exponent; null: chosen on the server's balanced images.
        calibrate: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range, there is no such network, or no linear layer gives its logits.
    """

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
        tau: float | None = 1.0,
        calibrate: When = "evaluations",
    ) -> None:
        super().__init__(
            num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho, calibrate
        )
        if tau is not None:
            require_range("tau", tau, least=0)
        self.uses_meta_set = self.uses_meta_set or tau is None

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        chosen = self.hparams["tau"] is None
        return Privileges(
            server="balanced labelled images" if chosen else NOTHING,
            work="server: tries 21 values of tau on its images" if chosen else NOTHING,
        )

    def calibrate(self, state: State, statistics: State, server: ServerSession) -> State:
        """Return the normalised rows, and a bias of 0."""
        weight, bias = self.classifier_of(state)
        tau = self.hparams["tau"]
        if tau is None:
            tau = self._best(weight, server)
            log.info("round %d: tau is %g", server.round_num, tau)
        return self.as_state(normalized_rows(weight, tau), torch.zeros_like(bias))

    def _best(self, weight: Tensor, server: ServerSession) -> float:
        """Return the tau of the grid with the highest accuracy on the balanced images."""
        right = torch.zeros(len(GRID), dtype=torch.int64)
        for draw in range(DRAWS):
            images, labels = server.meta(draw)
            with torch.no_grad():
                features, _ = features_and_logits(self.model, self.prepare(images))
            features, labels = features.to(weight), labels.to(weight.device)
            for place, tau in enumerate(GRID):
                right[place] += ((features @ normalized_rows(weight, tau).T).argmax(1) == labels).sum().cpu()
        return GRID[right.tolist().index(int(right.max()))]


def normalized_rows(weight: Tensor, tau: float) -> Tensor:
    """Divide each row by a power of its length; a row of zeros does not change.

    Args:
        weight: Shape (C, D).
        tau: The power: 0 changes nothing, 1 gives rows of length 1.

    Returns:
        ``W_c / |W_c|^tau``, shape (C, D).

    Example:
        >>> normalized_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return torch.where(length > 0, weight / length**tau, weight)
