"""The part of the data that each process of a training (DDP) gets."""

import logging

import pytorch_lightning as pl
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.trainer.states import TrainerStatus

from fedamm_pl.data.client import BatchLoader

log = logging.getLogger(__name__)


def place_among_ranks(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Return which process this is and how many there are; one alone where no Trainer runs that asks for batches."""
    if trainer is None or trainer.state.status is not TrainerStatus.RUNNING:
        return 0, 1
    return trainer.global_rank, trainer.world_size


def say_left_out(loader: BatchLoader, name: str) -> None:
    """Say how many images a pass leaves out, so that all processes get equally many."""
    if loader.left_out:
        rank_zero_only(log.warning)(
            "%d of %d %s images, others in each epoch, are left out, so that all %d processes get equally many",
            loader.left_out,
            len(loader.indices),
            name,
            loader.num_ranks,
        )
