"""FedAMM (Qian, Lu, Wang, *Long-Tailed Federated Learning via Aggregated Meta Mapping*, ICIP).

Not to be confused with two later methods of the same acronym (MICCAI 2025, TIFS 2025).
"""

import gc
import math
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning_fabric.utilities.data import sized_len
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import Differentiation, VirtualStep, meta_gradient, virtual_step
from fedamm_pl.data.client import Batch
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.losses import example_losses, normalized_weights, weighted_loss
from fedamm_pl.models import WeightNet
from fedamm_pl.protocol.classifier import require_range
from fedamm_pl.protocol.messages import Answer, Question, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession, ServerSession

MetaUpdate = Literal["asynchronous", "synchronous"]
LOSS_GRID = tuple(0.25 * step for step in range(41))
"""Losses in nats at which figures show the weight net, and the lower edges of their histogram of losses."""


class FedAMM(FederatedModule):
    """FedAvg whose clients weight each example by V(its loss), a weight net meta-learned against the server's meta set.

    ``asynchronous``: each client updates the weight net once a round, before its epochs, trains with the weight net it
    received and returns the updated one. ``synchronous``: it updates it every ``meta_interval`` steps with the mini-batch
    as support, and trains with the updated one. The server averages weight nets like classifiers. With a constant weight
    net a client's step equals FedAvg's.

    In a plain Trainer, on ``{"train": ..., "meta": ...}`` loaders, it is Meta-Weight-Net (Shu et al., NeurIPS 2019): the
    update is synchronous, an epoch is as long as the train loader, and the meta loader is cycled.

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
        meta_lr: Learning rate of the weight net; 0 leaves it as it is.
        meta_update: When a client updates the weight net: asynchronous (once a round) or synchronous.
        meta_interval: Synchronous: steps from one update to the next.
        differentiation: How the weight net's gradient is computed: higher, functional or forward (the fast one). All
            agree up to rounding.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    shared: ClassVar[tuple[str, ...]] = ("model.", "weight_net.")
    uses_meta_set: ClassVar[bool] = True
    trains_on_meta_set: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        model: str | nn.Module = "resnet32",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        info: ImageInfo | None = None,
        meta_lr: float = 0.01,
        meta_update: MetaUpdate = "asynchronous",
        meta_interval: int = 1,
        differentiation: Differentiation = "higher",
    ) -> None:
        super().__init__(num_classes, in_channels, model, lr, momentum, weight_decay, info)
        require_range("meta_lr", meta_lr, least=0)
        require_range("meta_interval", meta_interval, least=1)
        self.weight_net = WeightNet()
        self.automatic_optimization = False
        self._step: VirtualStep | None = None  # taken, and waiting for its meta gradient
        self._returned_weight_net: State = {}
        self._collected = -1  # the round in which garbage was last collected
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # labels, losses and weights of the epoch's batches

    def configure_optimizers(self) -> list[torch.optim.SGD]:
        """Return one SGD for the classifier and one for the weight net."""
        return [self.sgd(self.model, self.hparams["lr"]), self.sgd(self.weight_net, self.hparams["meta_lr"])]

    # Client

    def on_fit_start(self) -> None:
        """Refuse what would silently give a wrong meta gradient."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "Expected `precision` to be one without loss scaling for FedAMM, which would leave the meta gradient "
                "unscaled, got '16-mixed': take bf16-mixed."
            )

    @property
    def asks_in_fit(self) -> bool:
        """Whether the update is synchronous."""
        return bool(self.hparams["meta_update"] == "synchronous")

    def question(self, session: ClientSession) -> State | None:
        """Asynchronous: take the virtual step of the round, and ask for the meta gradient at w_hat."""
        return None if self.asks_in_fit else self._virtual_step(self._on_device(*session.support()))

    def on_train_start(self) -> None:
        """Federated and asynchronous: do the round's one meta step, and put its outcome aside for the result."""
        super().on_train_start()
        self._meta_loss: Tensor | None = None
        if self.session is None:
            return
        if self.hparams["differentiation"] == "higher" and self._collected != self.session.broadcast.round_num:
            self._collected = self.session.broadcast.round_num
            gc.collect()  # higher leaves its patched networks in reference cycles
        if self.session.answer is not None:
            received = self._weight_net_state()
            with self.session.during("meta step"), self.trainer.precision_plugin.forward_context():
                self._meta_step(self.session.answer)  # this hook runs outside of the trainer's arithmetic
            self._returned_weight_net = self._weight_net_state()
            self.load_state_dict(received, strict=False)

    def on_train_epoch_start(self) -> None:
        """In a plain Trainer: check the loaders and let the train loader set the length of the epoch."""
        self._seen = []
        if self.session is None:
            self._end_epoch_with_train_loader()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Update the weight net if it is time, then take a step on the weighted batch loss."""
        batch, meta = self._split(batch)
        images, labels = self.prepare(batch[0]), batch[1]
        if (self.session is None or self.asks_in_fit) and self._local_step % self.hparams["meta_interval"] == 0:
            self._synchronous_step((images, labels), meta)
        losses = example_losses(self.logits(images), labels)
        with torch.no_grad():
            raw_weights = self.weight_net(losses)
        optimizer = self._optimizers[0]
        optimizer.zero_grad()
        self.manual_backward(weighted_loss(losses, raw_weights))
        optimizer.step()
        self.track(len(labels), loss=losses.sum())
        if self.session is not None:
            self._seen.append((labels, losses.detach(), raw_weights))  # tallied once, after the fit

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means and the last meta loss."""
        super().on_train_epoch_end()
        if self._meta_loss is not None:
            self.log("train/meta_loss", self._meta_loss)

    def client_payload(self) -> State:
        """Return the trained classifier and the updated weight net."""
        return {**self.shared_state(), **self._returned_weight_net}

    def tallies(self) -> State:
        """Return the sums of the last local epoch.

        Returns:
            ``weights`` (C,): the relative weights B * omega_i of each class's examples, B the batch size; FedAvg's are 1.
            ``examples`` (C,): how many these are. ``losses``: examples by loss, a bin from each value of ``LOSS_GRID`` on.
        """
        counts = torch.zeros(int(self.hparams["num_classes"]), dtype=torch.float64)
        tallies = {"weights": counts, "examples": counts.clone(), "losses": torch.zeros(len(LOSS_GRID)).double()}
        if self._seen:
            labels = torch.cat([batch[0] for batch in self._seen]).cpu()
            losses = torch.cat([batch[1] for batch in self._seen]).double().cpu()
            weights = torch.cat([len(raw) * normalized_weights(raw) for *_, raw in self._seen]).double().cpu()
            bins = torch.bucketize(losses, torch.tensor(LOSS_GRID[1:], dtype=torch.float64), right=True)
            tallies["weights"].index_add_(0, labels, weights)
            tallies["examples"] += labels.bincount(minlength=len(counts))
            tallies["losses"] += bins.bincount(minlength=len(LOSS_GRID))
        return tallies

    def _virtual_step(self, support: Batch) -> State:
        """Take step 1 of a round and return w_hat; the step is kept for :meth:`_meta_step`."""
        lr, differentiation = self.hparams["lr"], self.hparams["differentiation"]
        self._step = step = virtual_step(self.model, self.weight_net, support, lr, differentiation)
        return {f"model.{name}": value for name, value in step.params.items()}

    def _meta_step(self, answer: Answer) -> None:
        """Update the weight net in place by steps 3 and 4 of a round.

        Args:
            answer: The meta gradient at w_hat, and the meta loss there.
        """
        gradient = {name.removeprefix("model."): value.to(self.device) for name, value in answer.payload.items()}
        self._meta_loss = answer.metrics["meta_loss"]
        step, self._step = self._step, None
        assert step is not None
        weight_net_gradient = step.weight_net_gradient(gradient)
        for name, parameter in self.weight_net.named_parameters():
            parameter.grad = weight_net_gradient[name]
        self._optimizers[1].step()

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
                answer = self._meta_gradient(stepped, meta)
            self._meta_step(answer)

    def _meta_gradient(self, stepped: State, meta: Batch) -> Answer:
        params = {name.removeprefix("model."): value.to(self.device) for name, value in stepped.items()}
        gradient, loss = meta_gradient(self.model, params, self._on_device(*meta))
        return Answer({f"model.{name}": value for name, value in gradient.items()}, {"meta_loss": loss})

    def _on_device(self, images: Tensor, labels: Tensor) -> Batch:
        """Prepare a batch that Lightning did not move: support and meta set may lie on the CPU."""
        return self.prepare(images), labels.to(self.device)

    @property
    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        return optimizers

    @property
    def _local_step(self) -> int:
        return max(self.trainer.fit_loop.total_batch_idx, 0)  # -1 before the first batch

    def _weight_net_state(self) -> State:
        return {name: value for name, value in self.shared_state().items() if name.startswith("weight_net.")}

    # Server

    def answer(self, question: Question, server: ServerSession) -> Answer:
        """Return the meta gradient g at the virtual weights of a client.

        Args:
            question: Holds w_hat.
            server: Has the meta set.
        """
        return self._meta_gradient(question.payload, server.meta_for(question))

    def diagnostics(self, tallies: State) -> dict[str, list[float | None]]:
        """Return the weight net on ``LOSS_GRID``, the mean relative weight of each class, and the histogram of losses.

        Returns:
            ``weight_curve``: V at each loss of ``LOSS_GRID``. ``weight_per_class``: mean of B * omega_i over the examples
            of a class in the clients' last epochs, 1 in FedAvg; None for a class that none of them holds.
            ``loss_histogram``: share of these examples by loss. The last two are left out without tallies.
        """
        with torch.no_grad():
            curve = self.weight_net(torch.tensor(LOSS_GRID).to(next(self.weight_net.parameters()))).tolist()
        if not tallies:
            return {"weight_curve": curve}
        means = (tallies["weights"] / tallies["examples"]).tolist()
        return {
            "weight_curve": curve,
            "weight_per_class": [None if math.isnan(mean) else mean for mean in means],
            "loss_histogram": (tallies["losses"] / tallies["losses"].sum()).tolist(),
        }

    # Plain Trainer

    def _split(self, batch: Any) -> tuple[Batch, Batch | None]:
        if self.session is not None:
            return batch, None
        return batch["train"], batch["meta"]

    def _end_epoch_with_train_loader(self) -> None:
        """Check the loaders of a plain Trainer, and let the train loader set the length of its epochs.

        Lightning's default for several loaders is the longest one.
        """
        loader = self.trainer.train_dataloader
        if not isinstance(loader, dict) or set(loader) != {"train", "meta"}:
            raise ValueError(
                'Expected loaders {"train": ..., "meta": ...} for FedAMM in a plain Trainer, '
                f"got {type(loader).__name__}: the meta loader yields balanced batches for the weight net."
            )
        trainer, length = self.trainer, sized_len(loader["train"])
        if length is None:
            return
        limit = trainer.limit_train_batches
        batches = int(length * limit) if isinstance(limit, float) else min(length, limit)
        if batches < trainer.num_training_batches:
            trainer.fit_loop.max_batches = batches
            if isinstance(trainer.val_check_interval, float):
                trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
