"""The fingerprint of a run: everything that determines its result, so that a run continues only with the same one."""

import platform
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from typing import Any

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.version import __version__

REPORTED_VERSIONS = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "higher", "numpy")


NEUTRAL = {
    "data.root",  # only a location: the content of the data is compared
    "data.partition_file",  # likewise
    "federation.num_rounds",
    "federation.eval_interval",
    "federation.max_failed_rounds",  # when to give up
    "federation.early_stopping",  # when to end
    "trainer.devices",  # which device of the kind
}
"""Options that do not change the result of a round. The executor's options are not part of the fingerprint either: with
the same number of threads all executors give the same result, or else the environment of their workers differs."""


def options(
    module: FederatedModule, data: FederatedDataModule, config: FederationConfig, trainer: TrainerConfig, seed: int
) -> dict[str, Any]:
    """Return all options by their names on the command line, in primitive types.

    Args:
        module: The algorithm.
        data: The data.
        config: How the federation runs.
        trainer: Hardware and precision, with ``auto`` already resolved.
        seed: The seed of the run.
    """
    model = module.hparams.get("model") or type(module.model).__qualname__
    groups: dict[str, Mapping[str, Any]] = {
        "algorithm": {
            **{name: v for name, v in module.hparams.items() if name not in ("info", "model")},
            "model": model,
        },
        "data": {**data.hparams, "num_clients": data.hparams.get("num_clients") or data.num_clients},
        "federation": vars(config),
        "trainer": {field.name: getattr(trainer, field.name) for field in fields(trainer)},
    }
    flat = {f"{group}.{name}": _primitive(v) for group, values in groups.items() for name, v in values.items()}
    return {"algorithm": _class_name(module), "data": _class_name(data), "seed": seed, **flat}


def hashes(data: FederatedDataModule) -> dict[str, str]:
    """Return the hash of the data and, if it does not follow from options and data alone, that of the partition."""
    return {"content_hash": data.content_hash} | (
        {"partition_hash": data.partition_hash} if data.partition_hash else {}
    )


def fingerprint(options: Mapping[str, Any], content: str, partition: str | None = None) -> dict[str, Any]:
    """Return what determines the result of a run: options, data, and the version of this package.

    Args:
        options: See :func:`options`.
        content: Hash of the data as the workers see them.
        partition: Hash of the partition, if it does not follow from options and data alone.
    """
    relevant = {name: value for name, value in options.items() if name not in NEUTRAL}
    shared_out = {"data (partition)": partition} if partition else {}
    return {"fedamm_pl": __version__, **relevant, "data (content)": content, **shared_out}


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries."""
    return {"python": platform.python_version(), **{name: version(name) for name in REPORTED_VERSIONS}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each difference."""
    return [
        f"{name} is {current.get(name)!r} but was {saved.get(name)!r}"
        for name in sorted({**saved, **current})
        if current.get(name) != saved.get(name)
    ]


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to ``group.option`` -> value, and ``group`` -> the bare name of its class."""
    if not isinstance(options, dict):
        return {prefix: options}
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name == "class_path":
            flat[prefix] = value.rpartition(".")[2]
        else:
            flat.update(flatten(value, prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")))
    return flat


def _class_name(instance: object) -> str:
    kind = type(instance)
    return kind.__name__ if kind.__module__.startswith("fedamm_pl.") else f"{kind.__module__}.{kind.__qualname__}"


def _primitive(value: Any) -> Any:
    """Convert an option to types that a checkpoint may hold."""
    if isinstance(value, dict):
        return {str(name): _primitive(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(part) for part in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
