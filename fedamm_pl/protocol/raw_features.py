"""``RawFeatures``: the part of a module that takes the features of a table as they are, and standardises them itself."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fedamm_pl.data.transforms import standardize


class RawFeatures(pl.LightningModule):
    """A module whose examples may be raw features (B, D), for which it keeps means and deviations in float32."""

    mean: Tensor
    _statistics: Tensor | None = None

    @property
    def takes_features(self) -> bool:
        """Whether its examples are features, not images."""
        return self._statistics is not None

    def take_features(self, mean: Tensor, std: Tensor) -> None:
        """Take features from now on, with these means and standard deviations, shape (D,) each."""
        # beside the buffers, which take the type of the weights: in bfloat16, raw features could not be told apart
        self._statistics = torch.stack([mean, std]).float()

    def standardized(self, features: Tensor) -> Tensor:
        """Return raw features (B, D), on the module's device, as the network takes them: in the type of the weights."""
        assert self._statistics is not None
        return standardize(features, *self._statistics).to(self.mean.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the statistics along with the buffers, but for their type."""
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._statistics is not None:
            self._statistics = self._statistics.to(self.mean.device)
        return module

    def setup(self, stage: str) -> None:
        """Let a Trainer leave raw features as they are; one of low precision would round them first."""
        if self._statistics is not None:
            vars(self.trainer.precision_plugin)["convert_input"] = _unchanged

    def teardown(self, stage: str) -> None:
        """Let the Trainer treat the batches of other modules as before."""
        if self._statistics is not None:
            vars(self.trainer.precision_plugin).pop("convert_input", None)


def _unchanged(batch: Any) -> Any:
    return batch
