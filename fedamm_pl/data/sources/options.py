"""``ReadOptions``: options for reading a data set."""

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a data set; see :class:`~fedamm_pl.data.datamodule.FederatedDataModule`."""

    label_column: str = "label"
    client_column: str = ""
    split_column: str = ""
    path_column: str = ""
    test_fraction: float = 0.2
    image_size: int | tuple[int, int] | None = None
    in_memory: bool | None = None
    seed: int = 0


def say_unused_share(test_fraction: float, where: str) -> None:
    """Warn if ``test_fraction`` is given for data with a test set, for which no examples are held out."""
    if test_fraction != ReadOptions.test_fraction:
        log.warning("%s: test_fraction %g is not used, since these data have a test set", where, test_fraction)
