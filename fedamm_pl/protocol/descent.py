"""``LocalDescent``: the optimizer of local training, SGD with momentum and weight decay, optionally sharpness-aware."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import nn

from fedamm_pl.sharpness import SharpnessAwareSGD

LocalOptimizer = Literal["sgd", "sam", "asam"]
RHO = {"sam": 0.1, "asam": 0.7}


class LocalDescent(pl.LightningModule):
    """The part of a classifier that creates its local optimizer.

    Attributes:
        model: The network.
        looks_ahead: Whether this is the first of the two passes of a sharpness-aware step; its gradient only locates
            the worst nearby point.
        sees_again: Whether this is the second pass over the same batch; the step is taken with its gradient.
    """

    model: nn.Module
    looks_ahead = False
    sees_again = False

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients with which a step is taken, if a plain Trainer is configured to do so."""
        if not self.looks_ahead:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @property
    def local_lr(self) -> float:
        """Learning rate of the local SGD."""
        return float(self.hparams["lr"])

    def local_sgd(self, module: nn.Module) -> torch.optim.SGD:
        """Return SGD for local training, sharpness-aware if ``local_optimizer`` is sam or asam."""
        kind, rho = self.hparams["local_optimizer"], self.hparams["rho"]
        if kind == "sgd":
            return self.sgd(module, self.local_lr)
        return SharpnessAwareSGD(
            {name: param for name, param in module.named_parameters() if param.requires_grad},
            lr=self.local_lr,
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            rho=RHO[kind] if rho is None else rho,
            adaptive=kind == "asam",
            first_pass=self._first_pass,
            second_pass=self._second_pass,
        )

    @contextmanager
    def _first_pass(self) -> Iterator[None]:
        """Mark the first pass, whose gradient only locates the worst nearby point.

        Raises:
            ValueError: In a plain Trainer that accumulates the gradients of several batches.
        """
        batches = self.trainer.accumulate_grad_batches
        if batches != 1:  # the second pass's gradient would be added to the first's
            raise ValueError(
                f"Expected `accumulate_grad_batches` to be 1 for sharpness-aware steps, which see one batch twice, got {batches}."
            )
        self.looks_ahead = True
        try:
            yield
        finally:
            self.looks_ahead = False

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        """Mark the second pass over a batch, which is not tracked and does not change running statistics."""
        buffers = list(self.model.buffers())
        before = [value.clone() for value in buffers]
        self.sees_again = True
        try:
            yield
        finally:
            self.sees_again = False
            for value, first in zip(buffers, before, strict=True):
                value.copy_(first)

    def sgd(self, module: nn.Module, lr: float) -> torch.optim.SGD:
        """Return SGD with the momentum and weight decay of this module."""
        momentum = self.hparams["momentum"]
        return torch.optim.SGD(
            [param for param in module.parameters() if param.requires_grad],
            lr=lr,
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=self.hparams["weight_decay"],
        )
