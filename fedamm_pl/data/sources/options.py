"""``ReadOptions``: how a data set is read."""

from dataclasses import dataclass


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
