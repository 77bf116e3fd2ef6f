"""``ClassPriorModule``: the base of methods that know how many examples of each class there are."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent
from fedamm_pl.protocol.classifier import LocalOptimizer
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ServerSession

Counts = Literal["local", "global"]


def check_absent(absent: str) -> None:
    """Check what a class without examples is to count as.

    Raises:
        ValueError: If it is neither mask nor one.
    """
    if absent not in get_args(Absent):
        raise ValueError(f"Expected `absent` to be mask or one, got {absent!r}.")


class ClassPriorModule(FederatedModule):
    """FedAvg whose clients know class counts: their own, or those of all clients together.

    Local counts never leave the client. Global counts are information about the clients' data that plain FedAvg does not
    need: the server sends them along with the model, and their bytes are counted. In a plain Trainer both are the counts
    in ``info``.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        model: A network's name, import path, or in Python a Module, see :class:`FederatedModule`.
        lr: Learning rate of the local SGD.
        momentum: Its momentum, Nesterov's unless 0.
        weight_decay: Its weight decay.
        info: What is known of the images: normalisation for uint8 input, class names, class counts, shot groups.
        local_optimizer: Of local training: sgd, or sam or asam, which follow the gradient at a worst point nearby.
        rho: How near that is; null: 0.1 for sam, 0.7 for asam.
        counts: Whose examples are counted: local (the client's own) or global (all clients').

    Raises:
        ValueError: If an option is out of range or there is no such network; at the start of a fit if counts are unknown.
    """

    class_counts: Tensor
    """Examples of each class, shape (C,), during a fit."""

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
        counts: Counts = "local",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if counts not in ("local", "global"):
            raise ValueError(f"Expected `counts` to be local or global, got {counts!r}.")
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64), persistent=False)

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model, and the global class counts if they are used."""
        sent = super().broadcast(state, server)
        return {**sent, "class_counts": self._known_counts()} if self.hparams["counts"] == "global" else sent

    def on_train_start(self) -> None:
        """Take the class counts of the fit."""
        super().on_train_start()
        if self.session is None:
            self.class_counts = self._known_counts().to(self.device)
        elif self.hparams["counts"] == "global":
            self.class_counts = self.session.payload["class_counts"].to(self.device)
        else:
            self.class_counts = self.session.data.class_counts(self.hparams["num_classes"]).to(self.device)

    def _known_counts(self) -> Tensor:
        if "class_counts" not in self.info:
            raise ValueError(f"Expected `info` of {type(self).__name__} to hold class_counts, got none.")
        return torch.tensor(self.info["class_counts"])
