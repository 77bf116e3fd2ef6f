"""``ClassPriorModule``: the base class of methods that use class counts."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent
from fedamm_pl.protocol.classifier import LocalOptimizer
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import Privileges
from fedamm_pl.protocol.session import ServerSession

Counts = Literal["local", "global", "estimated"]
ESTIMATED = "estimated."
COUNTS, SEEN = f"{ESTIMATED}counts", f"{ESTIMATED}seen"
TAKEN_PART = "taken_part"
FEWEST = 5
"""Lower bound on the estimated count of a class."""


def check_absent(absent: str) -> None:
    """Check the option that says how a class without examples is treated.

    Raises:
        ValueError: If it is neither mask nor one.
    """
    if absent not in get_args(Absent):
        raise ValueError(f"Expected `absent` to be mask or one, got {absent!r}.")


def class_shares(before: Tensor, after: Tensor) -> Tensor:
    """Infer the share of each class among the examples from an update of the classifier (GBME; Zeng et al., ICCV 2023).

    Examples of a class raise the weights of its output, and examples of other classes lower them. Features are mostly
    positive, so the sum of the changes shows which classes were present.

    Args:
        before: Weights of the classifier, shape (C, D).
        after: The same after training.

    Returns:
        Shares of shape (C,), in float64; nearly 0 where the sum did not rise, and all equal if it rose nowhere.

    Example:
        >>> class_shares(torch.zeros(3, 2), torch.tensor([[2.0, 1.0], [1.0, 0.0], [-3.0, -1.0]])).round(decimals=3)
        tensor([0.7500, 0.2500, 0.0000], dtype=torch.float64)
    """
    raised = (after.cpu().double() - before.cpu().double()).sum(1)
    raised = raised.where(raised > 0, 1e-5)
    return raised / raised.sum()


class ClassPriorModule(FederatedModule):
    """FedAvg whose clients know class counts: their own, or those of all clients together, as they are or as estimated.

    Local counts never leave the client. Global counts are information about the clients' data that plain FedAvg does
    not need: the server sends them along with the model, and their bytes are counted. In a plain Trainer, all three
    options use the counts in ``info``.

    With estimated counts no client reports its counts, and nothing extra is sent to the server, but the server *infers*
    them: it multiplies the class shares from each client's first update (see :func:`class_shares`) by the client's
    number of examples. The sum over the clients seen so far, at least 5 per class, is sent with the model. A client
    that takes part for the first time trains as if all classes were equally frequent, since the estimate assumes this.
    Whether it has taken part is known to the client and not sent. The server keeps the sum, and which clients it has
    seen. (In the paper, all clients train one such round before the first.) The network must end in a linear layer. A
    robust aggregation is refused, as one client's update can shift the sum.

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
        counts: Whose examples are counted: local (the client's own), global (all clients') or estimated (all clients', from
            updates).

    Raises:
        ValueError: If an option is out of range or there is no such network; at the start of a fit if counts are unknown.
    """

    class_counts: Tensor
    """Number of examples of each class during a fit, shape (C,)."""

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
        if counts not in get_args(Counts):
            raise ValueError(f"Expected `counts` to be local, global or estimated, got {counts!r}.")
        if counts == "estimated":
            self.returned = {**self.returned, ESTIMATED: "sum"}  # type: ignore[misc]  # an option decides
            self._head = self.head_name()
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64), persistent=False)

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        if self.hparams["counts"] == "global":
            return Privileges(server="the class counts of all clients together")
        if self.hparams["counts"] == "estimated":
            return Privileges(
                client_state="whether it has taken part",
                server_state="estimated class counts, who has taken part",
                work="server: infers class counts from each client's first update",
            )
        return Privileges()

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model, and the class counts of all clients if they are used."""
        sent = super().broadcast(state, server)
        if self.hparams["counts"] == "global":
            return {**sent, "class_counts": self.known_counts()}
        if self.hparams["counts"] == "estimated":
            return {**sent, "class_counts": self._estimated(state, server)[COUNTS].clamp(min=FEWEST)}
        return sent

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        """Return the model and, for estimated counts, the counts inferred from the client's first update."""
        payload = super().contribution(result, server)
        if self.hparams["counts"] != "estimated":
            return payload
        known = self._estimated(server.state, server)
        found = {name: torch.zeros_like(value) for name, value in known.items()}
        if not known[SEEN][result.client_id]:
            weight = f"{self._head}.weight"
            shares = class_shares(server.sent[weight], result.payload[weight])
            found[COUNTS] = (shares * result.num_examples).round().long()
            found[SEEN][result.client_id] = 1
        return {**payload, **found}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        """Take the averaged model, and add up the estimates."""
        state = super().server_step(state, reduced, server)
        if self.hparams["counts"] != "estimated":
            return state
        return {
            **state,
            **{name: value + reduced[name].cpu() for name, value in self._estimated(state, server).items()},
        }

    def on_train_start(self) -> None:
        """Set the class counts of the fit."""
        super().on_train_start()
        if self.session is None:
            self.class_counts = self.known_counts().to(self.device)
        elif self.hparams["counts"] == "local":
            self.class_counts = self.session.data.class_counts(self.hparams["num_classes"]).to(self.device)
        else:
            sent = self.session.payload["class_counts"].to(self.device)
            first = self.hparams["counts"] == "estimated" and TAKEN_PART not in self.session.kept
            self.class_counts = torch.ones_like(sent) if first else sent

    def client_payload(self) -> State:
        """Return the trained model; for estimated counts, record that the client has taken part."""
        if self.session is not None and self.hparams["counts"] == "estimated":
            self.session.kept = {**self.session.kept, TAKEN_PART: torch.tensor(True)}
        return super().client_payload()

    def _estimated(self, state: State, server: ServerSession) -> State:
        sizes = {COUNTS: self.hparams["num_classes"], SEEN: server.num_clients}
        return {name: state.get(name, torch.zeros(size, dtype=torch.int64)).cpu() for name, size in sizes.items()}
