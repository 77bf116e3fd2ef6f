"""``ReadOptions``: how a data set is read."""

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOptions:
    """How a data set is read, see :class:`~fedamm_pl.data.datamodule.FederatedDataModule`."""

    label_column: str = "label"
    client_column: str = ""
    split_column: str = ""
    path_column: str = ""
    test_fraction: float = 0.2
    image_size: int | tuple[int, int] | None = None
    in_memory: bool | None = None
    seed: int = 0


def say_unused_share(test_fraction: float, where: str) -> None:
    """Say that a share for testing, if one was asked for, is not held out, since the data bring their test set."""
    if test_fraction != ReadOptions.test_fraction:
        log.warning("%s: test_fraction %g is not used, since these data have a test set", where, test_fraction)
