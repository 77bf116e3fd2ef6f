"""FedAMM (Qian, Lu, Wang, *Long-Tailed Federated Learning via Aggregated Meta Mapping*, ICIP).

Not to be confused with two later methods of the same acronym (MICCAI 2025, TIFS 2025).
"""

import gc
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.meta.classes import Families, WhoseCounts
from fedamm_pl.algorithms.meta.exchange import Exchange, MetaExchange
from fedamm_pl.algorithms.meta.plain_trainer import check_client, check_trainer, end_epoch_with_train_loader
from fedamm_pl.algorithms.meta.ranks import summed
from fedamm_pl.algorithms.meta.tallies import described, tallied
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation
from fedamm_pl.algorithms.meta.weighing import Objective
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import Absent, weighted_loss
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State

MetaUpdate = Literal["asynchronous", "synchronous"]
WeightNetInit = Literal["default", "flat"]
LOSS_GRID = tuple(0.25 * step for step in range(41))
"""Losses (in nats) at which the figures show the weight net; also the lower bin edges of their loss histogram."""


class FedAMM(MetaExchange):
    """FedAvg whose clients weight each example by V(its loss); the weight net V is meta-learned on the server's meta set.

    ``asynchronous``: each client updates the weight net once per round, before its epochs; it trains with the received weight net and
    returns the updated one. ``synchronous``: each client updates the weight net every ``meta_interval`` steps, with the mini-batch as
    support, and trains with the updated one. The server averages weight nets like classifiers. With a constant weight net a client's step
    equals FedAvg's; ``weight_net_init: flat`` starts with one, so the first round is FedAvg's.

    With ``families``, V is the weight net of CMW-Net: it has one output for each family of classes of similar size,
    after shared layers. ``fixed`` families are the shot groups. ``local`` families are formed from the client's own
    class counts, which do not leave the client. ``global`` families are formed from the class counts of all clients;
    the server must know them and sends them with the model, 8 C bytes to each client, as with ``counts: global``. With
    one family, or with equal outputs, V is the plain weight net. ``objective`` is the loss that is weighted, and it is
    also the input of V; the meta loss remains the plain cross-entropy.

    The exchange before the epochs costs as many bytes as FedAvg: the client sends w_hat and receives g, each the size
    of w. ``exchange: bfloat16`` sends both in half the bytes, w_hat as its difference from w; ``head`` sends only the
    part of the last linear layer.

    The distance that V moves is about the number of meta steps times ``meta_lr`` times ``lr``, but no rule sets ``meta_lr`` for all data:
    with the same product, and nearly the same learned curve, accuracy rose on one data set and fell on another (docs/results.md). If the
    curve V(loss) in the figures is near 0 for all but the largest losses, ``meta_lr`` is large.

    Besides ``train/loss`` (the unweighted mean of the objective; the cross-entropy is comparable with FedAvg's) it logs
    ``train/meta_loss``, the loss on the meta set after the virtual step.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A name that :func:`fedamm_pl.models.registered` knows, the import path of a callable(num_classes, in_channels) ->
            Module, or in Python a Module (``load_from_checkpoint`` then needs ``model=`` again).
        lr: Learning rate of the local SGD and of the virtual step.
        momentum: Momentum (Nesterov unless 0) of local training and of the weight net; the virtual step has none.
        weight_decay: Weight decay of local training and of the weight net; the virtual step has none.
        info: What is known of the images: normalisation for uint8 input, class names, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.
        meta_lr: Learning rate of the weight net; 0 keeps it fixed.
        meta_update: When a client updates the weight net: asynchronous (once per round) or synchronous (every ``meta_interval`` steps).
        meta_interval: synchronous: steps between updates.
        differentiation: How the weight net's gradient is computed: higher, functional or forward (the fastest). All agree up to rounding.
            If the chosen one does not work for a network, another is used, and a message says so. Clients that ask together
            (``Vectorized``) use the fastest one if it works.
        weight_net_init: Initial weight net: default (PyTorch's random start) or flat (last layer 0, so V is 1/2 everywhere).
        weight_net_hidden: Width of its hidden layers.
        weight_net_depth: Number of its hidden layers.
        families: One output of the weight net per family of classes, where families are formed by local or global class counts, or are
            fixed (the shot groups in ``info``); null: one output for all classes.
        num_families: Number of families F formed from the counts, 1 to 9; fewer if there are fewer distinct counts.
        log_counts: Form families by log(1 + n) instead of the counts n.
        objective: The loss that is weighted: cross_entropy, logit_adjusted (as in ``LogitAdjusted``) or focal (``FedFocal``).
        counts: logit_adjusted: which prior: local (the client's own) or global (all clients'; sent with the model).
        tau: logit_adjusted: strength of the adjustment.
        absent: logit_adjusted: how a class without examples is treated: one (as if it had one example) or mask (left out).
        gamma: focal: exponent of the focal loss.
        detached: Treat V's input and the sum of the weights as constants in the virtual step, as in CMW-Net's program.
        exchange: Which part of w_hat and g is sent: full, bfloat16 (rounded) or head (only the last linear layer).

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    trains_on_meta_set: ClassVar[bool] = True
    plain_steps = True  # for asynchronous clients

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
        meta_lr: float = 0.01,
        meta_update: MetaUpdate = "asynchronous",
        meta_interval: int = 1,
        differentiation: Differentiation = "higher",
        weight_net_init: WeightNetInit = "default",
        weight_net_hidden: int = 100,
        weight_net_depth: int = 1,
        families: Families | None = None,
        num_families: int = 3,
        log_counts: bool = False,
        objective: Objective = "cross_entropy",
        counts: WhoseCounts = "local",
        tau: float = 1.0,
        absent: Absent = "one",
        gamma: float = 2.0,
        detached: bool = False,
        exchange: Exchange = "full",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("meta_lr", meta_lr, least=0)
        require_range("meta_interval", meta_interval, least=1)
        if weight_net_init not in get_args(WeightNetInit):
            raise ValueError(f"Expected `weight_net_init` to be default or flat, got {weight_net_init!r}.")
        self.check_weighting()
        self.check_exchange()
        flat = weight_net_init == "flat"
        self.weight_net = WeightNet(weight_net_hidden, weight_net_depth, self.num_outputs, flat)
        self.automatic_optimization = False
        self._unexamined = True  # until a plain Trainer has seen its first batch
        self._collected = -1  # the round in which garbage was last collected
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # labels, losses and weights of the epoch's batches

    def configure_optimizers(self) -> list[torch.optim.SGD]:
        """Return one SGD for the classifier and one for the weight net."""
        return [self.local_sgd(self.model), self.sgd(self.weight_net, self.hparams["meta_lr"])]

    # Client

    def on_fit_start(self) -> None:
        """Refuse settings that would silently give a wrong gradient; with several ranks, share rank 0's weight net."""
        if self.session is not None:
            check_client(self.trainer)
            return
        check_trainer(self.trainer)
        self._unexamined, self._meta_loss = True, None
        for parameter in self.weight_net.parameters() if self._joint else ():
            torch.distributed.broadcast(parameter.data, 0)

    def on_train_start(self) -> None:
        """Reset the epoch's sums; once per round, free the networks that ``higher`` leaves in reference cycles."""
        super().on_train_start()
        self.learn_classes(self.session)
        self._seen = []
        if self.session is None or self.hparams["differentiation"] != "higher":
            return
        if self._collected != self.session.broadcast.round_num:
            self._collected = self.session.broadcast.round_num
            gc.collect()

    def on_train_epoch_start(self) -> None:
        """In a plain Trainer: check the loaders and let the train loader set the length of the epoch."""
        self._seen = []
        if self.session is None:
            end_epoch_with_train_loader(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Update the weight net if an update is due, then take a step on the weighted batch loss."""
        batch, meta = self._split(batch)
        images, labels = self.prepare(batch[0]), batch[1]
        if self.session is None and self._unexamined:
            self._examine((images, labels))
            self._unexamined = False
        if (self.session is None or self.asks_in_fit) and self._local_step % self.hparams["meta_interval"] == 0:
            self._synchronous_step((images, labels), meta)
        optimizer = self._optimizers[0]

        def closure() -> Tensor:
            losses = self.objective_of(self.logits(images), labels)
            with torch.no_grad():
                raw_weights = self.weighing.weights(self.weight_net, losses, labels)
            optimizer.zero_grad()
            loss = self._loss_over_ranks(losses, raw_weights)
            self.manual_backward(loss)
            self.track(len(labels), loss=losses.sum())
            if self.session is not None and not self.sees_again:
                self._seen.append((labels, losses.detach(), raw_weights))  # tallied once, after the fit
            return loss

        optimizer.step(closure)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means and the last meta loss."""
        super().on_train_epoch_end()
        if self._meta_loss is not None:
            self.log_means({"meta_loss": self._meta_loss})

    def client_payload(self) -> State:
        """Return the trained classifier and the updated weight net."""
        returned, self._returned_weight_net = self._returned_weight_net, {}
        return {**self.shared_state(), **returned}

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example before weighting, shape (B,)."""
        return self.weighing.losses(logits, labels)

    def step_loss(self, logits: Tensor, labels: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weighted batch loss, and the losses before weighting."""
        losses = self.objective_of(logits, labels)
        with torch.no_grad():
            raw_weights = self.weighing.weights(self.weight_net, losses, labels)
        counted = (
            (losses, raw_weights) if present is None else (losses.where(present, 0), raw_weights.where(present, 0))
        )
        return weighted_loss(*counted), losses

    def observe(self, labels: Tensor, losses: Tensor) -> None:
        """Record the losses of a batch and their weights."""
        with torch.no_grad():
            self._seen.append((labels, losses, self.weighing.weights(self.weight_net, losses, labels)))

    def tallies(self) -> State:
        """Return the sums of the last local epoch, see :func:`fedamm_pl.algorithms.meta.tallies.tallied`."""
        return tallied(self._seen, int(self.hparams["num_classes"]), LOSS_GRID)

    def _loss_over_ranks(self, losses: Tensor, raw_weights: Tensor) -> Tensor:
        if not self._joint:
            return weighted_loss(losses, raw_weights)
        (total,) = summed([raw_weights.sum()])
        # multiplied by the number of ranks, since DDP averages the gradients over them
        return self.trainer.world_size * weighted_loss(losses, raw_weights, total)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _synchronous_step(self, support: Batch, meta: Batch | None) -> None:
        """Update the weight net in place, with a mini-batch as support.

        Args:
            support: Normalised images and labels.
            meta: The meta batch in a plain Trainer; None in a federation, where the server holds the meta set.
        """
        with self.session.during("meta step") if self.session else nullcontext():
            stepped = self._virtual_step(support)
            if self.session is not None:
                answer = self.session.ask(self._local_step, self._sent(stepped, self.session.payload))
            else:
                assert meta is not None
                answer = self._meta_gradient(stepped, meta, self._joint)
            self._meta_step(answer, self._optimizers[1].optimizer)  # not Lightning's wrapper, whose steps are counted

    @property
    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        return optimizers

    @property
    def _local_step(self) -> int:
        return max(self.trainer.fit_loop.total_batch_idx, 0)  # -1 before the first batch

    def diagnostics(self, tallies: State) -> dict[str, list[float | None]]:
        """Return the weight net on ``LOSS_GRID``, the mean relative weight of each class, and the histogram of losses.

        See :func:`fedamm_pl.algorithms.meta.tallies.described`.
        """
        return described(self.weight_net, tallies, LOSS_GRID)

    # Plain Trainer

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Entries that DDP ignores: the gradient of the weight net does not come from DDP's backward pass."""
        return [name for name in self.state_dict() if name.startswith("weight_net.")]

    def _split(self, batch: Any) -> tuple[Batch, Batch | None]:
        if self.session is not None:
            return batch, None
        return batch["train"], batch["meta"]
