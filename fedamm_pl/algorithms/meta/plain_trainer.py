"""FedAMM's requirements on a Lightning Trainer: settings that work under manual optimisation, and two loaders."""

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

log = logging.getLogger(__name__)
LOADERS = '{"train": ..., "meta": ...}'


def check_client(trainer: pl.Trainer) -> None:
    """Refuse settings in a client's fit that would silently give a wrong gradient or have no effect.

    Raises:
        ValueError: If the precision scales the loss, or there is an LR scheduler.
    """
    check_precision(trainer)
    if trainer.lr_scheduler_configs:
        name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise ValueError(
            "Expected `configure_optimizers` of a FedAMM in a federation to return no LR scheduler, which nothing would step, "
            f"got {name}."
        )


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse a precision with loss scaling.

    Raises:
        ValueError: If the precision scales the loss.
    """
    if trainer.precision == "16-mixed":
        raise ValueError(
            "Expected `precision` to be one without loss scaling for FedAMM, which would leave the meta gradient "
            "unscaled, got '16-mixed': use bf16-mixed."
        )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse settings of a plain Trainer that would silently give a wrong gradient; warn of LR schedulers.

    Raises:
        ValueError: If the precision scales the loss, the strategy splits the parameters, or ``limit_train_batches`` is
            a share that leaves no batch of the meta loader.
    """
    check_precision(trainer)
    whole = isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy)
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "Expected `strategy` to be one device or ddp for FedAMM, whose meta step needs the whole network on each "
            f"device, got {type(trainer.strategy).__name__}."
        )
    if trainer.lr_scheduler_configs:
        rank_zero_only(log.warning)(
            "FedAMM optimises manually, so Lightning steps none of the LR schedulers that were added: step them in a hook, "
            "`on_train_epoch_end` for example"
        )
    loaders, limit = trainer.fit_loop._data_source.instance, trainer.limit_train_batches
    if isinstance(loaders, Mapping) and "meta" in loaders and isinstance(limit, float):
        length = sized_len(loaders["meta"])
        if length and limit > 0 and int(length * limit) < 1:
            raise ValueError(
                "Expected `limit_train_batches` to be a number of batches like 10, or a share that leaves a batch of each "
                f"loader, got {limit} with a meta loader of {length}."
            )


def end_epoch_with_train_loader(trainer: pl.Trainer) -> None:
    """Check the loaders of a plain Trainer, and let the train loader set the length of its epochs.

    Lightning's default for several loaders is the longest one.

    Raises:
        ValueError: If the loaders are not a train and a meta loader, are combined in another way than cycling the
            shorter one, or do not determine the end of an epoch; or if a validation would never run.
    """
    loaders: Any = trainer.train_dataloader
    _check_loaders(loaders)
    mode = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
    if mode != "max_size_cycle":
        raise ValueError(f'Expected the CombinedLoader for FedAMM to have the mode "max_size_cycle", got "{mode}".')
    length, limit = sized_len(loaders["train"]), trainer.limit_train_batches
    if length is None:
        if sized_len(loaders["meta"]) != 1 and isinstance(limit, float):
            raise ValueError(
                "Expected a train loader with a length for FedAMM, or `limit_train_batches` to be a number of batches, got "
                f"neither: an epoch would end with the longer of two loaders, {LOADERS}."
            )
        return
    batches = int(length * limit) if isinstance(limit, float) else min(length, limit)
    if batches < trainer.num_training_batches:
        trainer.fit_loop.max_batches = batches
        _keep_validations(trainer, batches)


def _check_loaders(loaders: Any) -> None:
    if not isinstance(loaders, Mapping) or set(loaders) != {"train", "meta"}:
        got = f"the loaders {sorted(map(str, loaders))}" if isinstance(loaders, Mapping) else type(loaders).__name__
        raise ValueError(
            f"Expected loaders {LOADERS} for FedAMM in a plain Trainer, "
            f"got {got}: the meta loader yields balanced batches for the weight net."
        )
    for name, loader in loaders.items():
        if isinstance(loader, list | tuple | Mapping):
            raise ValueError(f'Expected one "{name}" loader for FedAMM in a plain Trainer, got {len(loader)}.')


def _keep_validations(trainer: pl.Trainer, batches: int) -> None:
    interval = trainer.val_check_interval
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(batches * interval))
    elif (
        isinstance(interval, int)
        and interval > batches
        and trainer.check_val_every_n_epoch is not None
        and trainer.limit_val_batches > 0
    ):
        raise ValueError(
            f"Expected `val_check_interval` to be at most the {batches} batches of the train loader, got {interval}."
        )
