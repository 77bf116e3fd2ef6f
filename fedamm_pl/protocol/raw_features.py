"""``RawFeatures``: the part of a module that accepts the raw features of a table and standardises them."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fedamm_pl.data.transforms import standardize


class RawFeatures(pl.LightningModule):
    """A module whose examples may be raw features (B, D); it keeps their means and standard deviations in float32."""

    mean: Tensor
    _statistics: Tensor | None = None

    @property
    def takes_features(self) -> bool:
        """Whether the examples are features, not images."""
        return self._statistics is not None

    def take_features(self, mean: Tensor, std: Tensor) -> None:
        """Expect features from now on, with these means and standard deviations, shape (D,) each."""
        # not as buffers, which take the type of the weights: in bfloat16, different raw features could become equal
        self._statistics = torch.stack([mean, std]).float()

    def standardized(self, features: Tensor) -> Tensor:
        """Standardise raw features (B, D) on the module's device, and return them in the type of the weights."""
        assert self._statistics is not None
        return standardize(features, *self._statistics).to(self.mean.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the statistics to the device of the buffers, but keep their type."""
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._statistics is not None:
            self._statistics = self._statistics.to(self.mean.device)
        return module

    def setup(self, stage: str) -> None:
        """Stop the Trainer from converting raw features, which a low precision would round."""
        if self._statistics is not None:
            vars(self.trainer.precision_plugin)["convert_input"] = _unchanged

    def teardown(self, stage: str) -> None:
        """Let the Trainer convert the batches of other modules again."""
        if self._statistics is not None:
            vars(self.trainer.precision_plugin).pop("convert_input", None)


def _unchanged(batch: Any) -> Any:
    return batch
