"""What determines the result of a run, so that a continued run is the same run."""

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from fedamm_pl.version import __version__

if TYPE_CHECKING:
    from fedamm_pl.federation.orchestrator import Orchestrator

REPORTED_VERSIONS = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "higher", "numpy")


def options(orchestrator: "Orchestrator") -> dict[str, Any]:
    """Return the options that can change the result, by their names on the command line, in primitive types."""
    module, data, trainer = orchestrator.module, orchestrator.data, orchestrator.trainer
    model = module.hparams.get("model") or type(module.model).__qualname__
    return {
        "algorithm": _class_name(module),
        **{f"algorithm.{name}": _primitive(v) for name, v in module.hparams.items() if name not in ("info", "model")},
        "algorithm.model": model,
        "data": _class_name(data),
        **{f"data.{name}": _primitive(value) for name, value in data.hparams.items() if name != "root"},
        "seed": orchestrator.seed,
        "federation.client_fraction": orchestrator.client_fraction,
        "federation.local_epochs": orchestrator.local_epochs,
        "federation.aggregation": orchestrator.aggregation,
        "federation.trim_fraction": orchestrator.trim_fraction,
        "federation.max_update_norm": orchestrator.max_update_norm,
        "federation.min_success_fraction": orchestrator.min_success_fraction,
        "trainer.accelerator": trainer.kind,
        "trainer.precision": trainer.resolved_precision,
        "trainer.memory_format": trainer.memory_format,
        "trainer.compile": trainer.compile,
    }


def fingerprint(orchestrator: "Orchestrator") -> dict[str, Any]:
    """Return the options, the content of the data, and the version of this package: a run goes on with the same only."""
    return {"fedamm_pl": __version__, **options(orchestrator), "data (content)": orchestrator.data.content_hash}


def environment() -> dict[str, Any]:
    """Return what can change the last digits of a result: versions of the libraries, and the number of threads."""
    return {**versions(), "threads": torch.get_num_threads()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries."""
    return {"python": platform.python_version(), **{name: version(name) for name in REPORTED_VERSIONS}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List what differs, one sentence each."""
    return [
        f"{name} is {current.get(name)!r} but was {saved.get(name)!r}"
        for name in sorted({**saved, **current})
        if current.get(name) != saved.get(name)
    ]


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to ``group.option`` -> value; a class stands for its group by its bare name."""
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
    """Turn an option into what a checkpoint may hold."""
    if isinstance(value, dict):
        return {str(name): _primitive(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(part) for part in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
