"""FedAMM (Qian, Lu, Wang, *Long-Tailed Federated Learning via Aggregated Meta Mapping*, ICIP).

Not to be confused with two later methods of the same acronym (MICCAI 2025, TIFS 2025).
"""

import gc
import logging
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import training_mode
from fedamm_pl.algorithms.meta.exchange import MetaExchange
from fedamm_pl.algorithms.meta.plain_trainer import check_client, check_trainer, end_epoch_with_train_loader
from fedamm_pl.algorithms.meta.ranks import summed
from fedamm_pl.algorithms.meta.suited import suited
from fedamm_pl.algorithms.meta.tallies import described, tallied
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses, weighted_loss
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.classifier import LocalOptimizer, require_range
from fedamm_pl.protocol.messages import State

MetaUpdate = Literal["asynchronous", "synchronous"]
log = logging.getLogger(__name__)
LOSS_GRID = tuple(0.25 * step for step in range(41))
"""Losses in nats at which figures show the weight net, and the lower edges of their histogram of losses."""


class FedAMM(MetaExchange):
    """FedAvg whose clients weight each example by V(its loss), a weight net meta-learned against the server's meta set.

    ``asynchronous``: each client updates the weight net once a round, before its epochs, trains with the weight net it
    received and returns the updated one. ``synchronous``: it updates it every ``meta_interval`` steps with the mini-batch
    as support, and trains with the updated one. The server averages weight nets like classifiers. With a constant weight
    net a client's step equals FedAvg's.

    In a plain Trainer, on ``{"train": ..., "meta": ...}`` loaders, it is Meta-Weight-Net (Shu et al., NeurIPS 2019): the
    update is synchronous, an epoch is as long as the train loader, and the meta loader is cycled. Steps, in ``max_steps`` and
    ``global_step``, are the classifier's; so are those that call ``on_before_optimizer_step``. With the strategy ``ddp`` the
    batches of all devices are one: the weights are normalised over them, and both gradients are added up.

    Logged beside ``train/loss`` (the unweighted mean cross-entropy, comparable with FedAvg's): ``train/meta_loss``, the
    loss on the meta set after the virtual step.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour.
        model: A name in :data:`fedamm_pl.models.MODELS`, the import path of a callable(num_classes, in_channels) ->
            Module, or in Python a Module (``load_from_checkpoint`` then needs ``model=`` again).
        lr: Learning rate of the local SGD and of the virtual step.
        momentum: Momentum of both SGDs, Nesterov's unless 0; the virtual step has none.
        weight_decay: Weight decay of both SGDs; the virtual step has none.
        info: What is known of the images: normalisation for uint8 input, class names, shot groups.
        local_optimizer: Of local training: sgd, or sam or asam, which follow the gradient at a worst point nearby.
        rho: How near that is; null: 0.1 for sam, 0.7 for asam.
        meta_lr: Learning rate of the weight net; 0 leaves it as it is.
        meta_update: When a client updates the weight net: asynchronous (once a round) or synchronous.
        meta_interval: Synchronous: steps from one update to the next.
        differentiation: How the weight net's gradient is computed: higher, functional or forward (the fast one). All
            agree up to rounding. For a network that it is not right for, another one is taken, which is said. Clients that ask
            at once, side by side, take the fast one if it is right.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    trains_on_meta_set: ClassVar[bool] = True
    plain_steps = True  # of asynchronous clients

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
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info, local_optimizer, rho)
        require_range("meta_lr", meta_lr, least=0)
        require_range("meta_interval", meta_interval, least=1)
        self.weight_net = WeightNet()
        self.automatic_optimization = False
        self._unexamined = True  # whether the first batch of a plain Trainer is still to come
        self._collected = -1  # the round in which garbage was last collected
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # labels, losses and weights of the epoch's batches

    def configure_optimizers(self) -> list[torch.optim.SGD]:
        """Return one SGD for the classifier and one for the weight net."""
        return [self.local_sgd(self.model), self.sgd(self.weight_net, self.hparams["meta_lr"])]

    def check(self, batch: Batch) -> None:
        """Find out whether the differentiation is right for the network, and say it if another is taken."""
        with training_mode(self.model):
            self._examine(self._on_device(*batch))

    # Client

    def on_fit_start(self) -> None:
        """Refuse what would silently give a wrong gradient; in a plain Trainer, start with equal weight nets."""
        if self.session is not None:
            check_client(self.trainer)
            return
        check_trainer(self.trainer)
        self._unexamined, self._meta_loss = True, None
        for parameter in self.weight_net.parameters() if self._joint else ():
            torch.distributed.broadcast(parameter.data, 0)

    def on_train_start(self) -> None:
        """Start the epoch's sums; once a round, collect what ``higher`` leaves in reference cycles: its patched networks."""
        super().on_train_start()
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
        """Update the weight net if it is time, then take a step on the weighted batch loss."""
        batch, meta = self._split(batch)
        images, labels = self.prepare(batch[0]), batch[1]
        if self.session is None and self._unexamined:
            self._examine((images, labels))
            self._unexamined = False
        if (self.session is None or self.asks_in_fit) and self._local_step % self.hparams["meta_interval"] == 0:
            self._synchronous_step((images, labels), meta)
        optimizer = self._optimizers[0]

        def closure() -> Tensor:
            losses = example_losses(self.logits(images), labels)
            with torch.no_grad():
                raw_weights = self.weight_net(losses)
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

    def batch_loss(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weighted batch loss."""
        with torch.no_grad():
            raw_weights = self.weight_net(losses)
        if present is not None:
            losses, raw_weights = losses.where(present, 0), raw_weights.where(present, 0)
        return weighted_loss(losses, raw_weights)

    def observe(self, labels: Tensor, losses: Tensor) -> None:
        """Note the losses of a batch and what they weigh."""
        with torch.no_grad():
            self._seen.append((labels, losses, self.weight_net(losses)))

    def tallies(self) -> State:
        """Return the sums of the last local epoch, see :func:`fedamm_pl.algorithms.meta.tallies.tallied`."""
        return tallied(self._seen, int(self.hparams["num_classes"]), LOSS_GRID)

    def _loss_over_ranks(self, losses: Tensor, raw_weights: Tensor) -> Tensor:
        if not self._joint:
            return weighted_loss(losses, raw_weights)
        (total,) = summed([raw_weights.sum()])
        # times the number of ranks, since DDP takes the mean of their gradients
        return self.trainer.world_size * weighted_loss(losses, raw_weights, total)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _synchronous_step(self, support: Batch, meta: Batch | None) -> None:
        """Update the weight net in place, with a mini-batch as support.

        Args:
            support: Normalised images and labels.
            meta: The meta batch in a plain Trainer; in a federation the server has it.
        """
        with self.session.during("meta step") if self.session else nullcontext():
            stepped = self._virtual_step(support)
            if self.session is not None:
                answer = self.session.ask(self._local_step, stepped)
            else:
                assert meta is not None
                answer = self._meta_gradient(stepped, meta, self._joint)
            self._meta_step(answer, self._optimizers[1].optimizer)  # not Lightning's own, whose steps count

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
        """Read by DDP: the weight net's gradient comes from no backward pass of its own."""
        return [name for name in self.state_dict() if name.startswith("weight_net.")]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _examine(self, batch: Batch) -> None:
        wanted = self.hparams["differentiation"]
        way, reason = suited(self.model, batch, wanted, anew=True)
        if reason:
            name = type(self.model).__name__
            rank_zero_only(log.warning)(
                "differentiation %s is not right for %s (%s): %s is taken instead", wanted, name, reason, way
            )

    def _split(self, batch: Any) -> tuple[Batch, Batch | None]:
        if self.session is not None:
            return batch, None
        return batch["train"], batch["meta"]
