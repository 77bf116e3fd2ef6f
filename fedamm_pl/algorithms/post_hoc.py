"""``PostHocModule``: the base class of methods that change the classifier of a trained model, but not the training."""

from typing import Literal, get_args

from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.precision import at_least_float32
from fedamm_pl.protocol.classifier import LocalOptimizer
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule

When = Literal["end", "evaluations"]


class PostHocModule(FederatedModule):
    """FedAvg whose classifier, the last linear layer, is replaced for an evaluation; the next round trains without that.

    A subclass returns the new classifier from :meth:`calibrate`. It need not be trained by FedAvg:
    ``class Mine(CCVR, FedProx)`` calibrates the model that FedProx trains.

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
        calibrate: evaluations (before each evaluation) or end (only before the last one).

    Raises:
        ValueError: If an option is out of range, there is no such network, or no linear layer gives its logits.
    """

    uses_features = True

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
        calibrate: When = "evaluations",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if calibrate not in get_args(When):
            raise ValueError(f"Expected `calibrate` to be end or evaluations, got {calibrate!r}.")
        self._head = self.head_name()

    def calibrates(self, last: bool) -> bool:
        """Return whether the classifier is replaced for this evaluation."""
        return last or self.hparams["calibrate"] == "evaluations"

    def classifier_of(self, state: State) -> tuple[Tensor, Tensor]:
        """Return weight (C, D) and bias (C,) of the classifier in a state, in float32 or better."""
        return at_least_float32(state[f"{self._head}.weight"]), at_least_float32(state[f"{self._head}.bias"])

    def as_state(self, weight: Tensor, bias: Tensor) -> State:
        """Return a classifier as entries of a state."""
        return {f"{self._head}.weight": weight, f"{self._head}.bias": bias}
