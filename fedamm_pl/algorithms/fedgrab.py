"""Fed-GraB (Xiao et al., *Fed-GraB: Federated Long-tailed Learning with Self-Adjusting Gradient Balancer*, NeurIPS 2023)."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.precision import at_least_float32
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.privileges import NOTHING, Privileges
from fedamm_pl.protocol.session import ServerSession
from fedamm_pl.seeding import derive_seed, torch_generator

Ranks = Literal["estimated", "global_counts"]
CONTROLLER, COUNTS = "controller", "class_counts"
MAX_CONTROL = 100.0
"""Bound on the control variable u."""
HIGHEST = 10.0
"""Upper bound on the weight of a gradient."""
BASE = 0.1
"""Probability that the smallest class is skipped in a batch; for the largest class it is 1."""


class FedGraB(FederatedModule):
    """FedAvg with one sigmoid per class, whose positive and negative gradients are balanced by a controller at each client.

    The loss is the binary cross-entropy summed over the classes. Each client keeps for each class the totals P_c and
    N_c of the absolute gradients that the logit of the class has received from examples of the class and from other
    examples. Before each step a PID controller turns N_c - P_c into a control variable u_c, see :func:`controlled`. The
    gradients of the class's own examples are multiplied by phi(u_c), those of the others by phi(-u_c), see
    :func:`weight_of`. In each batch, a class is skipped at random with probability 0.1^(r_c / (C - 1)), where r_c is
    its rank by size: always for the largest class (r = 0), one time in ten for the smallest. The gradients of a skipped
    class are not weighted and not added to its totals, but u_c is still updated.

    Ranks are ``estimated`` from the lengths of the classifier's rows in the received model, since larger classes have
    longer rows, or computed from ``global_counts``: the class counts of all clients together, which the server must
    then know and sends with the model, 8 C bytes. Nothing else is sent. A client keeps 5 C numbers between its rounds.

    The authors' program never trains the classifier, uses the index of a class as its rank, and does not bound u. Here
    the classifier is trained, ranks are determined as above, and u stays between -100 and 100. With all three gains 0
    it is FedAvg on the binary cross-entropy. ``train/loss`` is always the unweighted binary cross-entropy;
    ``test/loss`` is that of the softmax. With ``local_optimizer: sam`` a step sees its batch twice, and the controller
    is updated once. In a plain Trainer the controller starts at 0 with each fit; with several devices each has its own.

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
        ranks: How classes are ranked by size: estimated (from the received classifier) or global_counts (sent with the model).
        proportional: Gain of the controller on the change of the error.
        integral: Gain on the error.
        derivative: Gain on the change of that change.

    Raises:
        ValueError: If an option is out of range or there is no such network; or if ranks are to be estimated and no linear
            layer gives the logits.
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
        ranks: Ranks = "estimated",
        proportional: float = 10.0,
        integral: float = 0.01,
        derivative: float = 0.1,
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        if ranks not in get_args(Ranks):
            raise ValueError(f"Expected `ranks` to be estimated or global_counts, got {ranks!r}.")
        require_range("proportional", proportional, least=0)
        require_range("integral", integral, least=0)
        require_range("derivative", derivative, least=0)
        self._classifier = self.classifier_name() if ranks == "estimated" else ""

    @property
    def privileges(self) -> Privileges:
        """The method's requirements, disclosures and costs beyond those of FedAvg."""
        known = self.hparams["ranks"] == "global_counts"
        return Privileges(
            server="the class counts of all clients together" if known else NOTHING,
            client_state="five numbers per class",
        )

    # Client

    def on_train_start(self) -> None:
        """Load the client's controller, and compute how likely each class is to be skipped."""
        super().on_train_start()
        kept = None if self.session is None else self.session.kept.get(CONTROLLER)
        fresh = torch.zeros(5, self.hparams["num_classes"], dtype=torch.float32)
        self._controller = (fresh if kept is None else kept.clone()).to(self.device)
        self._chances = chances_of(self._sizes().detach().float()).cpu()
        self._generator: torch.Generator | None = None
        if self.session is not None:
            self._generator = torch_generator(derive_seed(self.session.task.seed, "FedGraB"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Update the controller, and return the binary cross-entropy with the weights that it gives."""
        images, labels = batch
        logits = self(images)
        logits = at_least_float32(logits)
        members = functional.one_hot(labels, logits.shape[1]).to(logits)
        if not self.sees_again:
            gains = (self.hparams["proportional"], self.hparams["integral"], self.hparams["derivative"])
            self._controller = controlled(self._controller, gains)
            drawn = torch.rand(len(self._chances), dtype=torch.float32, generator=self._generator)
            self._balanced = (drawn >= self._chances).to(self.device)
        weights = example_weights(self._controller[2], members, self._balanced)
        losses = functional.binary_cross_entropy_with_logits(logits, members, reduction="none")
        if not self.sees_again:
            self._controller = counted(self._controller, logits.detach(), members, weights, self._balanced)
        self.track(len(labels), loss=losses.sum())
        return self.batch_loss((weights * losses).sum(1))

    def client_payload(self) -> State:
        """Keep the controller, and return the model."""
        assert self.session is not None
        self.session.kept = {CONTROLLER: self._controller}
        return super().client_payload()

    def _sizes(self) -> Tensor:
        """Return the numbers by which classes are ranked, shape (C,)."""
        if self.hparams["ranks"] == "estimated":
            weight: Tensor = self.model.get_submodule(self._classifier).weight  # type: ignore[assignment]
            lengths: Tensor = weight.norm(dim=1)
            return lengths
        return self.known_counts() if self.session is None else self.session.payload[COUNTS]

    # Server

    def broadcast(self, state: State, server: ServerSession) -> State:
        """Send the model, and the global class counts if they are used."""
        sent = super().broadcast(state, server)
        return {**sent, COUNTS: self.known_counts()} if self.hparams["ranks"] == "global_counts" else sent


def weight_of(control: Tensor) -> Tensor:
    """Return phi(u) = 10 / (1 + 9 exp(-u / 2)), the weight of gradients: 1 at 0, between 0 and 10.

    Args:
        control: Control variable u, of any shape.

    Example:
        >>> weight_of(torch.tensor([-100.0, 0.0, 100.0])).round(decimals=4)
        tensor([ 0.,  1., 10.])
    """
    return HIGHEST / (1 + (HIGHEST - 1) * (-control / 2).exp())


def chances_of(sizes: Tensor) -> Tensor:
    """Return the probability that each class is skipped in a batch: 0.1^(r_c / (C - 1)), r_c its rank by size.

    Args:
        sizes: Numbers by which classes are ranked, shape (C,). The largest has rank 0; of equal ones the first is
            ranked first.

    Returns:
        Probabilities of shape (C,).

    Example:
        >>> chances_of(torch.tensor([7.0, 9.0, 5.0]))
        tensor([0.3162, 1.0000, 0.1000])
    """
    order = sizes.argsort(descending=True, stable=True)
    ranks = torch.empty(len(sizes), device=sizes.device).index_copy(
        0, order, torch.arange(len(sizes), device=sizes.device, dtype=torch.float32)
    )
    return BASE ** (ranks / max(len(sizes) - 1, 1))


def controlled(controller: Tensor, gains: tuple[float, float, float]) -> Tensor:
    """Update the controller, with e = N - P: ``u + K_p (e - e') + K_i e + K_d (e - 2 e' + e'')``, bounded by 100.

    Args:
        controller: Totals P and N, control u, the last error e' and the one before it e'', shape (5, C).
        gains: K_p, K_i and K_d.

    Returns:
        The updated controller, shape (5, C).
    """
    positive, negative, control, last, before = controller
    error = negative - positive
    proportional, integral, derivative = gains
    moved = control + proportional * (error - last) + integral * error + derivative * (error - 2 * last + before)
    return torch.stack([positive, negative, moved.clamp(-MAX_CONTROL, MAX_CONTROL), error, last])


def example_weights(control: Tensor, members: Tensor, balanced: Tensor) -> Tensor:
    """Return the weight of each logit's gradient, shape (B, C): phi(u) for the example's own class, else phi(-u).

    Args:
        control: Control variable u, shape (C,).
        members: 1 where an example belongs to the class, else 0; shape (B, C).
        balanced: Which classes are controlled in this batch, shape (C,); the others have weight 1.
    """
    weights = torch.where(members > 0, weight_of(control), weight_of(-control))
    return torch.where(balanced, weights, 1.0).to(members)


def counted(controller: Tensor, logits: Tensor, members: Tensor, weights: Tensor, balanced: Tensor) -> Tensor:
    """Add the absolute weighted gradients of a batch's mean loss to the totals of the controlled classes.

    Args:
        controller: Shape (5, C), see :func:`controlled`.
        logits: Logits of shape (B, C).
        members: Shape (B, C), see :func:`example_weights`.
        weights: Weights of the gradients, shape (B, C).
        balanced: Which classes are controlled in this batch, shape (C,).

    Returns:
        The controller with new totals, shape (5, C).
    """
    sizes = (weights * (logits.sigmoid() - members)).abs() / len(logits)  # (B, C): |d loss / d logits|
    totals = torch.stack([(sizes * members).sum(0), (sizes * (1 - members)).sum(0)])
    return torch.cat([controller[:2] + totals.where(balanced, 0).to(controller), controller[2:]])
