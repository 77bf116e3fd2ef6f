"""``Classifier``: a network with its normalisation, loss, optimizer and metrics, as a LightningModule."""

import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.data.transforms import normalize
from fedamm_pl.losses import example_losses
from fedamm_pl.models import build_model, classifier_of, complete_lazy_layers, logits_of
from fedamm_pl.protocol.descent import LocalDescent, LocalOptimizer
from fedamm_pl.protocol.measured import MeasuredModule
from fedamm_pl.protocol.options import check_info, require_range
from fedamm_pl.protocol.raw_features import RawFeatures

__all__ = ["Classifier", "LocalOptimizer", "require_range"]


class Classifier(LocalDescent, RawFeatures, MeasuredModule):
    """A classifier that trains in a plain Trainer on batches (images, labels), and measures accuracy by groups of classes.

    If ``image_size`` in ``info`` is empty, the examples are rows of a table. Raw features of shape (B, in_channels)
    then take the place of images everywhere, and the module standardises them.

    Args:
        num_classes: Number of classes C.
        in_channels: Image channels: 1 grey, 3 colour, or the number of features of a table.
        model: A name that :func:`fedamm_pl.models.registered` knows, the import path of a callable(num_classes, in_channels) ->
            Module (``load_from_checkpoint`` then needs ``trust_model=True`` or ``model=``), or in Python a Module
            (``load_from_checkpoint`` then needs ``model=`` again).
        lr: Learning rate of the local SGD.
        momentum: Its Nesterov momentum; 0 for none.
        weight_decay: Its weight decay.
        info: What is known of the images or features: their means and deviations, class names, shot groups.
        local_optimizer: Optimizer of local training: sgd, sam or asam; the latter two follow the gradient at the worst nearby point.
        rho: Radius of the neighbourhood of sam and asam; null: 0.1 for sam, 0.7 for asam.

    Attributes:
        memory_format: Layout of the network's input images: channels-last for networks with ``channels_last = True``,
            which are faster with it, else contiguous. A federation's trainer may set another layout.
        compiled: A compiled form of the network for plain forward passes, given as ``torch.compile(network)`` or set by
            a federation's trainer; None: the network itself. Code that needs second or forward-mode derivatives, or the
            network's features, calls ``model``.
        compiles: Whether the network was given compiled; a federation then compiles its copies too, with torch's
            defaults.

    Raises:
        ValueError: If an option is out of range or there is no such network.
    """

    mean: Tensor
    std: Tensor

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
    ) -> None:
        super().__init__()
        require_range("num_classes", num_classes, least=1)
        require_range("in_channels", in_channels, least=1)
        require_range("lr", lr, above=0)
        require_range("momentum", momentum, least=0)
        require_range("weight_decay", weight_decay, least=0)
        if local_optimizer not in get_args(LocalOptimizer):
            raise ValueError(f"Expected `local_optimizer` to be sgd, sam or asam, got {local_optimizer!r}.")
        if rho is not None:
            require_range("rho", rho, least=0)
            if local_optimizer == "sgd":
                raise ValueError(f"Expected `rho` with `local_optimizer` sam or asam, got {rho} with sgd.")
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else None)
        self.info: ImageInfo = info or {}
        check_info(self.info, num_classes, in_channels)
        network = build_model(model, num_classes, in_channels) if isinstance(model, str) else model
        if not isinstance(network, nn.Module):
            raise ValueError(f"Expected `model` to be a name, an import path or a Module, got {reprlib.repr(network)}.")
        self.model: nn.Module = getattr(network, "_orig_mod", network)  # without the prefix _orig_mod in state_dict
        self.compiles = self.model is not network
        self.compiled: Callable[[Tensor], Any] | None = partial(network) if self.compiles else None
        self.memory_format = (
            torch.channels_last if getattr(self.model, "channels_last", False) else torch.contiguous_format
        )
        complete_lazy_layers(self.model, self._example())
        mean = torch.tensor(self.info["mean"]) if "mean" in self.info else torch.zeros(in_channels)
        std = torch.tensor(self.info["std"]) if "std" in self.info else torch.ones(in_channels)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if not self.info.get("image_size", [1, 1]):
            self.take_features(mean, std)
        self.make_measures(num_classes, self.info.get("shot_groups"))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits.

        Args:
            images: uint8 images (B, in_channels, H, W), floating-point images that are already normalised, or raw
                features (B, in_channels).

        Returns:
            Logits of shape (B, num_classes).
        """
        return self.logits(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Move images to the module's device, normalise them if they are uint8, and convert them to ``memory_format``.

        Features are standardised in float32 or better, and then converted to the type of the weights; never prepare
        them twice.
        """
        images = images.to(self.mean.device)
        if self.takes_features:
            return self.standardized(images)
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        return images.to(memory_format=self.memory_format) if images.ndim == 4 else images

    def logits(self, prepared: Tensor) -> Tensor:
        """Map prepared images to logits of shape (B, num_classes), with the compiled network if there is one."""
        return logits_of((self.compiled or self.model)(prepared))

    def classifier_name(self) -> str:
        """Return the name, within the network, of the linear layer that returns its logits.

        Raises:
            ValueError: If there is no such layer, or it is also used elsewhere, or if the image size is unknown and it
                is not clear which layer it is.
        """
        return classifier_of(self.model, self._example(), self.hparams["num_classes"])

    def head_name(self) -> str:
        """Return the ``state_dict`` name of the layer that returns the logits, without ``.weight`` and ``.bias``.

        It is used by methods that replace the layer's values.

        Raises:
            ValueError: If no linear layer returns the logits, no layer comes before it, or it does not consist of a
                plain weight and a bias.
        """
        name = self.classifier_name()
        head = f"model.{name}"
        if not name or not {f"{head}.weight", f"{head}.bias"} <= self.state_dict().keys():
            raise ValueError(
                "Expected `model` to have layers before its last linear one, and that one a plain weight and a bias, "
                f"for {type(self).__name__}, got {type(self.model).__name__}."
            )
        return head

    def replace_classifier(self, make: Callable[[nn.Linear], nn.Module]) -> str:
        """Replace the layer that returns the logits by another module, for methods with a different head.

        Args:
            make: The layer -> the module that replaces it, which maps features (B, D) to logits (B, C).

        Returns:
            Name of the new module within this module.

        Raises:
            ValueError: If no linear layer returns the logits.
        """
        name = self.classifier_name()
        replaced = self.model.get_submodule(name)
        assert isinstance(replaced, nn.Linear)
        parent, _, child = name.rpartition(".")
        if child:
            setattr(self.model.get_submodule(parent), child, make(replaced))
            return f"model.{name}"
        self.model = make(replaced)
        self.compiled = partial(torch.compile(self.model)) if self.compiles else None
        return "model"

    def _example(self) -> Tensor | None:
        """Return an image (or features) of zeros as the network expects it, or None if the image size is unknown."""
        if "image_size" not in self.info:
            return None
        like = next((value for value in self.model.parameters() if not is_lazy(value)), torch.zeros(()))
        return torch.zeros(1, self.hparams["in_channels"], *self.info["image_size"]).to(like)

    @property
    def network_name(self) -> str:
        """Name of the network in messages: the name by which it was given, or its class."""
        return str(self.hparams.get("model", type(self.model).__name__))

    def known_counts(self) -> Tensor:
        """Return the class counts in ``info``, shape (C,).

        Raises:
            ValueError: If ``info`` has none.
        """
        if "class_counts" not in self.info:
            raise ValueError(f"Expected `info` of {type(self).__name__} to hold class_counts, got none.")
        return torch.tensor(self.info["class_counts"])

    # Training

    def on_train_start(self) -> None:
        """Reset the sums from which the epoch's means are computed."""
        self._sums: dict[str, Tensor] = {}
        self._num_seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the :meth:`step_loss` of a batch (images, labels)."""
        images, labels = batch
        loss, losses = self.step_loss(self(images), labels)
        self.track(len(labels), loss=losses.sum())
        return loss

    def step_loss(self, logits: Tensor, labels: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss that a step minimises, and the :meth:`objective` of each example.

        The first is the :meth:`batch_loss` of the second. Override this method only if the way in which the examples'
        losses are combined depends on the labels.

        Args:
            logits: Scores of shape (B, C).
            labels: Classes of shape (B,).
            present: Which of the examples count, shape (B,); None: all.
        """
        losses = self.objective_of(logits, labels)
        return self.batch_loss(losses, present), losses

    def objective_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the :meth:`objective` of a batch.

        Raises:
            ValueError: If it is not one loss per example, but, for example, their mean.
        """
        losses = self.objective(logits, labels)
        if losses.shape != labels.shape:
            raise ValueError(
                f"Expected `objective` of {type(self).__name__} to return one loss per example, of shape {tuple(labels.shape)}, "
                f"got shape {tuple(losses.shape)}: leave the mean to `batch_loss`."
            )
        return losses

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example, whose average is minimised in training; by default the cross-entropy.

        Args:
            logits: Scores of shape (B, C).
            labels: Classes of shape (B,).

        Returns:
            Losses of shape (B,).
        """
        return example_losses(logits, labels)

    def batch_loss(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the loss that a step minimises, given the :meth:`objective` of a batch; by default its mean.

        Args:
            losses: Losses of shape (B,).
            present: Which of the losses count, shape (B,); None: all. The others fill up smaller batches when clients
                whose batches differ in size train in parallel.
        """
        return losses.mean() if present is None else losses.where(present, 0).sum() / present.sum()

    def track(self, num_examples: int, **sums: Tensor) -> None:
        """Add to sums that are kept on the device; at the end of the epoch their means are logged as ``train/...``.

        Args:
            num_examples: Number of examples B of the batch.
            sums: Scalars by name, summed over the batch.
        """
        if self.sees_again:
            return
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._num_seen += num_examples

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means over all devices."""
        sums, num_seen = self._sums, float(self._num_seen)
        if self.trainer.world_size > 1:
            add = partial(self.trainer.strategy.reduce, reduce_op="sum")
            sums = {name: add(value) for name, value in sums.items()}
            num_seen = float(add(torch.tensor(num_seen, device=self.device)))
        self.log_means({name: value / num_seen for name, value in sums.items()})
        self._sums, self._num_seen = {}, 0

    def log_means(self, means: Mapping[str, Tensor]) -> None:
        """Log means over an epoch, which are equal on all devices, as ``train/...``."""
        self.log_dict({f"train/{name}": value for name, value in means.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the local optimizer for the parameters of the network only."""
        return self.local_sgd(self.model)

    # Other

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return class probabilities (B, C) for a batch of images or raw features, with or without labels."""
        images = batch[0] if isinstance(batch, tuple | list) else batch
        return self.forward(images).softmax(1)
